"""`Deployment.bind`: a deployment with the arguments of its constructor, which may be such bound deployments too."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, NoReturn

from typing_extensions import TypeVar

if TYPE_CHECKING:
    from qserve.deployments.deployment import Deployment

T_co = TypeVar("T_co", covariant=True, default=Any)


class Membership(NamedTuple):
    """Which application a deployment belongs to.

    Attributes:
        application: Its name; "" for a deployment by itself.
        is_root: The deployment serves the application over HTTP.
        declared: How the config file names the application, for the root of one that comes from a file; else "".
    """

    application: str = ""
    is_root: bool = False
    declared: str = ""


ALONE: Final = Membership()


class Application(Generic[T_co]):
    """What `Deployment.bind(...)` makes: a deployment, with those that it uses among the arguments of its constructor.

    It never changes. `serve.run` deploys it; in the replica, each application among the arguments, in lists, tuples and
    dicts too, is a `DeploymentHandle`. The same object in two places is one deployment.

    Attributes:
        deployment: What is bound.
        args, kwargs: The arguments of its constructor.
    """

    def __init__(self, deployment: "Deployment[T_co]", args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.deployment = deployment
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        return f"Application({self.deployment.name!r})"

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"{self!r} is not deployed, and cannot be called: `handle = serve.run(app)`, then `handle.remote(...)`."
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):  # copy, pickle and IPython ask for such names
                raise AttributeError(name)
            hint = "deploy it with `serve.run(app)`, and call methods on the handle that it returns"
            raise AttributeError(f"{self!r} has no attribute {name!r}: {hint}.", name=name, obj=self)
