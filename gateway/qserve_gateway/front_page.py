"""What is at `/` where no deployment has that route: a page that says what is served."""

from collections.abc import Mapping
from html import escape
from urllib.parse import quote

from qserve.wire.messages import HttpResponse
from qserve_gateway.respond import text_response

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>qserve</title>
<style>body {{ font: 1rem/1.6 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1rem }}</style>
<h1>qserve</h1>
<p>{said}</p>
<ul>
{rows}</ul>
</html>
"""
_NOTHING = "Nothing is deployed with a route yet. `qserve deploy MODULE` deploys what a module defines."


def front_page(routes: Mapping[str, str], root_path: str, accept: bytes) -> HttpResponse:
    """Make the page, as HTML for browsers and as text for others.

    Args:
        routes: Route prefix -> deployment name.
        root_path: The prefix under which the gateway lives.
        accept: The header of that name.
    """
    said = "No deployment has the route /. These are served:" if routes else _NOTHING
    if b"text/html" not in accept:
        rows = "".join(f"{root_path}{prefix}  {name}\n" for prefix, name in routes.items())
        return text_response(200, f"{said}\n{rows}")
    rows = "".join(
        f'<li><a href="{escape(quote(root_path + prefix), quote=True)}">{escape(root_path + prefix)}</a> '
        f"{escape(name)}</li>\n"
        for prefix, name in routes.items()
    )
    headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", _POLICY)]
    return HttpResponse(200, headers, _PAGE.format(said=escape(said), rows=rows).encode())


_POLICY = b"default-src 'none'; style-src 'unsafe-inline'"
