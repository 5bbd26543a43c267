"""kdfast: a distillation engine for PyTorch that reads each logit once and writes each gradient once."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdfast import cache, distributed, methods, plan, tuning
    from kdfast.cache.error import CacheError
    from kdfast.distiller import Distiller
    from kdfast.loss import DistillLoss, distill_loss
    from kdfast.ops._registry import backends
    from kdfast.reporting.report import report
    from kdfast.soft_targets import soft_targets
    from kdfast.spec import reference
    from kdfast.spec.divergence import Divergence
    from kdfast.spec.head import LMHead
    from kdfast.spec.packed import PackedTargets
    from kdfast.spec.reduction import DistillTerms, Metrics
    from kdfast.spec.sparse import SparseTargets
    from kdfast.uld import uld_loss

if importlib.util.find_spec("kdfast._core") is None:  # before anything runs in plain PyTorch, slowly and unasked
    _here = Path(__file__).parent
    if (_here.parent / "CMakeLists.txt").exists():
        _why = (
            f"Python found the source tree at {_here}, which is not built: start it in another folder (or with "
            'python -P), where the installed package is found; pip install ".[test]" there installs it'
        )
    else:
        _why = f"{_here} was not built for this Python: pip install --force-reinstall kdfast"
    _why = f"kdfast has no compiled extension kdfast._core. {_why}"
    raise ImportError(_why)

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "DistillLoss",
    "DistillTerms",
    "Distiller",
    "Divergence",
    "LMHead",
    "Metrics",
    "PackedTargets",
    "SparseTargets",
    "__version__",
    "backends",
    "cache",
    "distill_loss",
    "distributed",
    "methods",
    "plan",
    "reference",
    "report",
    "soft_targets",
    "tuning",
    "uld_loss",
]

#: Where a name is, which is imported when it is first asked for: the command line answers without torch.
_HOMES = {
    "CacheError": "cache.error",
    "DistillLoss": "loss",
    "DistillTerms": "spec.reduction",
    "Distiller": "distiller",
    "Divergence": "spec.divergence",
    "LMHead": "spec.head",
    "Metrics": "spec.reduction",
    "PackedTargets": "spec.packed",
    "SparseTargets": "spec.sparse",
    "backends": "ops._registry",
    "distill_loss": "loss",
    "report": "reporting.report",
    "soft_targets": "soft_targets",
    "uld_loss": "uld",
}
#: Modules by the name that they have here.
_MODULES = {name: name for name in ("cache", "distributed", "integrations", "methods", "plan", "tuning")}
_MODULES["reference"] = "spec.reference"
#: Modules by the names that they had, for what was pickled then, with the homes that their names have now.
_FORMER = {
    "kdfast.divergence": ("kdfast.spec.divergence",),
    "kdfast.packed": ("kdfast.spec.packed",),
    "kdfast.reference": ("kdfast.spec.reference",),
    "kdfast.targets": ("kdfast.spec.head", "kdfast.spec.sparse"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found: Any = importlib.import_module(f"kdfast.{_MODULES[name]}")
    elif name in _HOMES:
        importlib.import_module("torch")
        _register()
        found = getattr(importlib.import_module(f"kdfast.{_HOMES[name]}"), name)
    else:
        msg = f"module 'kdfast' has no attribute {name!r}"
        raise AttributeError(msg)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})


class _Package(types.ModuleType):
    """This package, in which the function ``soft_targets`` stands before the module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "soft_targets" and isinstance(value, types.ModuleType):
            value = value.soft_targets
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


class _Finder:
    """Finds modules under former names, and registers the operators as soon as there is a torch to do it with.

    A program that was exported names operators and nothing else of this package: ``import kdfast`` is what it takes for
    ``torch.export.load`` to find them, whichever of the two is imported first.
    """

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in _FORMER:
            return ModuleSpec(name, _Former())  # type: ignore[arg-type]  # importlib.abc would be imported for its type
        if name != "torch":
            return None
        sys.meta_path.remove(_Finder)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                sys.meta_path.insert(0, _Finder)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Former:
    """Makes a module of a former name, which has what its names lead to now."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        importlib.import_module("torch")
        for home in _FORMER[module.__name__]:
            vars(module).update({k: v for k, v in vars(importlib.import_module(home)).items() if k[:2] != "__"})


def _register() -> None:
    """Registers the operators, unless a module that is being imported is on its way to them."""
    waiting = (sys.modules[name] for name in list(sys.modules) if name.startswith("kdfast."))
    if not any(getattr(module.__spec__, "_initializing", False) for module in waiting):
        for module in ("_registry", "uld.operators", "unpack.operators"):
            importlib.import_module(f"kdfast.ops.{module}")


sys.meta_path.insert(0, _Finder)
if "torch" in sys.modules:
    _register()
