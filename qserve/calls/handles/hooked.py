"""A call with the hooks of this process around it."""

from types import TracebackType
from typing import Any

from qserve.hooks import CallKind, ClientCall, ClientHook, HookChain, checked_meta


class HookedCall:
    """Runs the hooks before a call that is about to be made, and those after it once the outcome is known.

    As a context manager it surrounds what makes the call: what is raised there is the outcome.

    Attributes:
        meta: What the hooks have added, and what travels with the call.
    """

    def __init__(
        self, hooks: HookChain[ClientHook], deployment: str, method: str, kind: CallKind, *, durable: bool = False
    ) -> None:
        self._hooks = hooks
        self._call = ClientCall(deployment, method, kind, durable)
        self._states = hooks.before(self._call)
        self.meta = checked_meta(self._call.meta)

    def __enter__(self) -> "HookedCall":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Run the hooks after the call, which has ended with an error or with None."""
        if error is None:
            self._hooks.after(self._call, self._states)
        else:
            self._hooks.error(self._call, self._states, error)

    def end_with(self, ref: Any) -> None:
        """Run the hooks after the call, which has ended as a ref did: a callback for that ref."""
        try:
            self.end(ref.exception(0))
        except Exception as cancelled:
            self.end(cancelled)
