"""A plugin that teaches mypy `@serve.deployment` and handles: put `plugins = ["qserve.mypy_plugin"]` into its settings.

mypy ignores what the decorator of a class returns, and takes the decorated class for the class alone. With the plugin,
the class has the attributes of a Deployment too, and `handle.method.remote(...)` has the parameters and the result of
that method.
"""

from collections.abc import Callable
from typing import cast

from mypy.erasetype import erase_typevars
from mypy.nodes import TypeInfo
from mypy.plugin import AttributeContext, ClassDefContext, Plugin
from mypy.typeops import make_simplified_union
from mypy.types import AnyType, CallableType, Instance, ProperType, Type, TypeOfAny, get_proper_type

_DECORATORS = ("qserve.deployments.deployment.deployment", "qserve.serve.deployment")
_HANDLES = ("qserve.calls.handle.DeploymentHandle", "qserve.calls.handle.AsyncDeploymentHandle")
_REF = "qserve.calls.ref.Ref"
_METACLASSES = {
    "builtins.type": "qserve.deployments.deployment.DeployedClass",
    "abc.ABCMeta": "qserve.deployments.deployment.DeployedAbstractClass",
}
"""What becomes the metaclass of a decorated class, by the one that it has. Others stay."""


class QServePlugin(Plugin):
    """Changes the types of decorated classes and of the attributes of handles."""

    def get_class_decorator_hook(self, fullname: str) -> Callable[[ClassDefContext], None] | None:
        # At once, for the classes that are derived from this one; what it needs may not be known yet.
        return _try_to_be_deployment if fullname in _DECORATORS else None

    def get_class_decorator_hook_2(self, fullname: str) -> Callable[[ClassDefContext], bool] | None:
        return _be_deployment if fullname in _DECORATORS else None

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        owner, _, name = fullname.rpartition(".")
        if owner not in _HANDLES or name.startswith("_"):
            return None
        return lambda context: self._type_of_method(context, name)

    def _type_of_method(self, context: AttributeContext, name: str) -> Type:
        handle = get_proper_type(context.type)
        code = get_proper_type(handle.args[0]) if isinstance(handle, Instance) and handle.args else None
        if not isinstance(handle, Instance) or not isinstance(code, Instance):
            return context.default_attr_type
        if code.type.get(name) is None:
            context.api.fail(f'Deployment of "{code.type.name}" has no method "{name}"', context.context)
            return AnyType(TypeOfAny.from_error)
        checker = context.api.expr_checker  # type: ignore[attr-defined]
        method = checker.analyze_external_member_access(name, code, context.context)
        return Instance(handle.type, [self._accepting_refs(get_proper_type(method))])

    def _accepting_refs(self, method: ProperType) -> Type:
        """The same method, which also accepts a ref for each argument: it is called with the value of the ref."""
        symbol = self.lookup_fully_qualified(_REF)
        if not isinstance(method, CallableType) or symbol is None or not isinstance(symbol.node, TypeInfo):
            return method
        ref = Instance(symbol.node, [AnyType(TypeOfAny.explicit)])
        if method.variables:  # which a ParamSpec cannot have
            method = cast(CallableType, erase_typevars(method)).copy_modified(variables=())
        return method.copy_modified(arg_types=[make_simplified_union([each, ref]) for each in method.arg_types])


def plugin(version: str) -> type[Plugin]:
    """The function that mypy calls in the module of a plugin."""
    return QServePlugin


def _try_to_be_deployment(context: ClassDefContext) -> None:
    _be_deployment(context)


def _be_deployment(context: ClassDefContext) -> bool:
    info = context.cls.info
    had = "builtins.type" if info.metaclass_type is None else info.metaclass_type.type.fullname
    if had in _METACLASSES:
        made = context.api.lookup_fully_qualified_or_none(_METACLASSES[had])
        if made is None or not isinstance(made.node, TypeInfo):
            return False
        # Declared, so that it is the one of classes that are derived from this one, too.
        info.declared_metaclass = info.metaclass_type = Instance(made.node, [])
    return True
