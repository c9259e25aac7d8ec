"""Deploying applications, and deleting them."""

from collections.abc import Collection, Iterable, Sequence

from qserve.broker.instance.state import State
from qserve.deployments import deploying
from qserve.wire.spec import Deployed, DeploymentSpec


class JointGoal:
    """Deployments on their way to being served: applications, each as a whole, and deployments that belong to none.

    Args:
        specs: What is to be deployed, side by side.
        leaving: Applications that are deleted when all is served; their routes are free for others at once.

    Attributes:
        goals: One for each deployment, in the same order.

    Raises:
        ValueError: A route belongs to another deployment, `prev_version` is not what is deployed, or two of them have
            one name or one route; then nothing is deployed.
    """

    def __init__(self, state: State, specs: Sequence[DeploymentSpec], leaving: Iterable[str] = ()) -> None:
        _refuse_doubles(specs)
        self._state = state
        self._failed: set[str] = set()
        names = {spec.name for spec in specs}
        applications = ({spec.application for spec in specs} - {""}) | set(leaving)
        listed = state.list()
        self._stale = {name for name, each in listed.items() if each.spec.application in applications} - names
        routes = {each.spec.route_prefix: name for name, each in listed.items()}
        wanted = {spec.name: spec.route_prefix for spec in specs}
        for spec in specs:
            if spec.application and spec.route_prefix is not None:
                owner = routes.get(spec.route_prefix, spec.name)
                if wanted.get(owner, spec.route_prefix) == spec.route_prefix:  # else it gives the route up now
                    self._take_route(spec, owner)
        # Those without a route first: one of them may have had the route that another one gets.
        ordered = sorted(specs, key=lambda spec: spec.route_prefix or "")
        moving = {name for name, route in wanted.items() if name in listed and listed[name].spec.route_prefix != route}
        goals = {spec.name: self._deploy(spec, moving) for spec in ordered}
        self.goals = [goals[spec.name] for spec in specs]

    def wait(self) -> None:
        """Wait until all is served, then delete the deployments that an application had before and has no more.

        Raises:
            RuntimeError: Deployments failed; see `Deployment.deploy`. The others serve what was deployed.
        """
        if failures := self.wait_for_each():
            raise RuntimeError("\n".join([*failures, *self.mixed()]))
        self.clean_up()

    def wait_for_each(self) -> list[str]:
        """Wait until each is served, or has failed and is rolled back; returns what went wrong with those."""
        failures = []
        for goal in self.goals:
            try:
                goal.wait()
            except RuntimeError as exc:
                self._failed.add(goal.name)
                failures.append(str(exc))
        return failures

    def mixed(self) -> list[str]:
        """A sentence for each application that is left with deployments of different deploys, since some failed."""
        members: dict[str, list[DeploymentSpec]] = {}
        for goal in self.goals:
            members.setdefault(goal.deployed.spec.application, []).append(goal.deployed.spec)
        return [
            self._mixture(application, specs)
            for application, specs in members.items()
            if application and 0 < sum(spec.name in self._failed for spec in specs) < len(specs)
        ]

    def _mixture(self, application: str, specs: Sequence[DeploymentSpec]) -> str:
        new = [_named(spec) for spec in specs if spec.name not in self._failed]
        left = {spec.name: self._state.find(spec.name) for spec in specs if spec.name in self._failed}
        old = [_named(each.spec) for each in left.values() if each is not None]
        gone = [name for name, each in left.items() if each is None]
        parts = [
            f"new: {', '.join(new)}",
            *([f"as before: {', '.join(old)}"] if old else []),
            *([f"not there: {', '.join(gone)}"] if gone else []),
        ]
        return (
            f"The application {application!r} is left with deployments of different deploys ({'; '.join(parts)}). "
            "Deploy it again, mended or as it was before, so that they fit together."
        )

    def clean_up(self) -> None:
        """Delete the deployments that an application has no more."""
        delete_all(self._state, self._stale)

    def _deploy(self, spec: DeploymentSpec, moving: Collection[str]) -> deploying.Goal:
        try:
            return deploying.deploy(self._state, spec, moving)
        except ValueError as exc:
            raise ValueError(f"Deployment {spec.name!r}: {exc}") from exc

    def _take_route(self, spec: DeploymentSpec, owner: str) -> None:
        """Delete the deployment that has the route of an application, if it is one that the application has no more."""
        if owner == spec.name:
            return
        if owner not in self._stale:
            raise ValueError(
                f"The application {spec.application!r} cannot have the route {spec.route_prefix!r}: it belongs to the "
                f"deployment {owner!r}. Give it another one: serve.run(app, name=..., route_prefix=...)."
            )
        delete_all(self._state, [owner])
        self._stale -= {owner}


def _refuse_doubles(specs: Sequence[DeploymentSpec]) -> None:
    names, routes = set[str](), dict[str, str]()
    for spec in specs:
        if spec.name in names:
            raise ValueError(
                f"Two deployments that are to be deployed together are named {spec.name!r}, and one would replace the "
                "other: give one of them, or its application, another name."
            )
        names.add(spec.name)
        if spec.route_prefix is not None and routes.setdefault(spec.route_prefix, spec.name) != spec.name:
            raise ValueError(
                f"The deployments {routes[spec.route_prefix]!r} and {spec.name!r} cannot both have the route "
                f"{spec.route_prefix!r}: give one of them another route_prefix, or None."
            )


def _named(spec: DeploymentSpec) -> str:
    return spec.name if spec.version is None else f"{spec.name} version {spec.version}"


def deployments_of(state: State, application: str) -> dict[str, Deployed]:
    """The deployments of an application, by their names within the instance; none if there is no such application."""
    return {name: each for name, each in state.list().items() if each.spec.application == application}


def declared_applications(state: State) -> set[str]:
    """The applications that were deployed from a config file."""
    return {each.spec.application for each in state.list().values() if each.spec.declared}


def root_of(state: State, application: str) -> Deployed | None:
    """The deployment that serves an application."""
    return next((each for each in deployments_of(state, application).values() if each.spec.is_root), None)


def delete_all(state: State, names: Iterable[str], *, wait: bool = True) -> None:
    """Delete deployments side by side, and wait until no gateway knows them and they are gone."""
    found = [(name, state.find(name)) for name in names]
    log_ids = [log_id for name, _ in found if (log_id := state.delete(name)) is not None]
    if not wait:
        return
    if log_ids:
        deploying.wait_for_gateways(state, log_ids[-1])
    for _, deployed in found:
        if deployed is not None:
            deploying.finish_deleting(state, deployed.spec)
