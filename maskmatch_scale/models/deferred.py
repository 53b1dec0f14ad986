"""Building a model without room for all of its weights: each is made again, bit for bit, when it is asked for.

While a model is built inside `DeferredBuild`, the libraries run as always: every operation is carried out, on real
memory, with the numbers of torch's own generator. What was done is noted. When the weights that are in memory exceed
`RESIDENT_BYTES`, the oldest are freed; one that is needed once more is made again by the noted operations, each random
one from the generator's state before it. So the numbers are those of a build that keeps everything, whatever the
libraries do on the way: drawing twice, drawing until all numbers lie in a range, scaling layers afterwards, resampling
what a file holds. Tensors of a safetensors file are read one at a time. `models/replay.py` has the notes.

The model that remains has parameters on the meta device, and `DeferredWeights`, which makes their values one by one.
The idea is torchdistx's deferred initialisation. There, operations run on tensors without values, which libraries
recognise: torch's own `trunc_normal_` then draws nothing.

Decision: docs/decisions/0039-deferred-weights-at-zero-3.md.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskmatch_scale.memory import return_freed_memory
from maskmatch_scale.models.replay import OVERWRITING, Notes, Piece, memory_of

_log = logging.getLogger(__name__)

RESIDENT_BYTES = 2**26
"""Weights that may stay in memory during the build, beside those that an operation is using."""
SMALLEST_BYTES = 2**14
"""Tensors below this are never freed: norms, biases, tokens."""

_aten = torch.ops.aten
_LOOK_ONLY = {_aten.detach.default, _aten.alias.default, _aten.view.default}
"""Operations that need no values: they also run on memory that was freed."""
_PAST_TORCH = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.data_ptr, torch.Tensor.__array__,
               torch.Tensor.__dlpack__}  # fmt: skip
"""Functions that read memory without an operation of torch, so that it could be freed under them."""

M = TypeVar("M", bound=nn.Module)


class StoredWeights(Protocol):
    """Weights that are not in memory, such as those of a file or of a checkpoint, by their names."""

    def __iter__(self) -> Iterator[str]:
        """The names."""

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor: contiguous, on the CPU, in memory of its own."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it."""


class SafetensorsFile:
    """The tensors of a safetensors file as `StoredWeights`. The file is not kept open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                self._kinds[name] = shape, (part[:0] if shape else file.get_tensor(name)).dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `StoredWeights`."""
        return self._kinds[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """See `StoredWeights`."""
        return self._kinds[name][1]


class DeferredWeights:
    """Makes the values of a model's parameters, one at a time; the same on every rank, without communication."""

    def __init__(self, build: DeferredBuild, pieces: dict[str, Piece]) -> None:
        self._build = build
        self._pieces = pieces

    def __deepcopy__(self, memo: dict[int, Any]) -> DeferredWeights:
        return self  # it does not change, so a copy of the model shares it

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def make(self, name: str) -> Tensor:
        """The value of a parameter, by its name in the model: on the CPU, in memory of its own.

        Raises:
            RuntimeError: a tensor that it was made from has changed since.
        """
        piece = self._pieces[name]
        made = piece.on(self._build.notes.replay(piece.memory))
        self._build.count_freed(made.untyped_storage().nbytes())  # the one before it, and what this one was made from
        return made


class DeferredBuild(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While this is entered, tensors that torch makes may be freed and made again (see the module's docstring).

    Raises:
        NotImplementedError: from within the build, by what cannot be made again.
    """

    entered: DeferredBuild | None = None
    """The one that is entered at present."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.notes = Notes()
        self.is_paused = False
        self._resident: OrderedDict[int, None] = OrderedDict()
        """Memories that have their values, the one used last at the end."""
        self._freed_bytes = 0
        self._guard = _RefusePastTorch(self.notes)

    def __enter__(self) -> DeferredBuild:
        DeferredBuild.entered = self
        self._guard.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._guard.__exit__(*error)  # type: ignore[no-untyped-call]
        DeferredBuild.entered = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_paused or func in _LOOK_ONLY:
            return func(*args, **kwargs)
        memories = self.notes.memories
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [tensor for tensor in tensors if tensor in self.notes]
        written = _written(func, args, kwargs)
        changed = [tensor for tensor in written if tensor in self.notes]
        self._refuse(func, args, kwargs, written, changed)
        whole = [t for t in changed if func in OVERWRITING and memories[memory_of(t)].fills(t)]
        overwritten = {memory_of(tensor) for tensor in whole}
        reads = {memory_of(tensor) for tensor in known if not any(tensor is target for target in whole)}
        apart = func is _aten.clone.default or (func is _aten.copy_.default and whole and not overwritten & reads)
        if apart and any(memories[memory].is_freed for memory in reads):
            return self._copy_later(func, args, kwargs, changed, overwritten)
        for memory in overwritten | reads:
            self._restore(memory, values=memory in reads)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        state = torch.get_rng_state() if draws else None
        versions = {id(tensor): tensor._version for tensor in tensors}
        result = func(*args, **kwargs)
        if any(memories[memory].is_freed for memory in overwritten | reads):
            raise NotImplementedError(f"{func} changes the size of a weight's memory")
        inputs = {memory_of(tensor) for tensor in tensors}
        made = [
            (place, leaf)
            for place, leaf in enumerate(tree_leaves(result))
            if isinstance(leaf, Tensor) and memory_of(leaf) not in inputs and _counts(leaf)
        ]
        if made and len(changed) < len(written):
            raise NotImplementedError(f"{func} makes a weight and changes another tensor")
        if changed or made:
            self.notes.add(
                func, args, kwargs,
                state=state, changed=changed, overwritten=overwritten, made=made, versions=versions,
            )  # fmt: skip
        used = (*overwritten, *reads, *(memory_of(leaf) for _, leaf in made))
        for memory in used:
            self._resident[memory] = None
            self._resident.move_to_end(memory)
        self._free_oldest(keep=len(used))
        return result

    def _refuse(self, func: Any, args: Any, kwargs: Any, written: list[Tensor], changed: list[Tensor]) -> None:
        """Raise NotImplementedError on what could not be made again."""
        storages = [a for a in args if isinstance(a, torch.UntypedStorage | torch.TypedStorage)]
        if any(storage._cdata in self.notes.memories for storage in storages):
            raise NotImplementedError(f"{func} lays a tensor on a weight's memory")
        if changed and len(changed) < len(written):
            raise NotImplementedError(f"{func} changes both a weight and another tensor")
        if kwargs.get("generator") is not None:
            raise NotImplementedError(f"{func} draws from a generator of its own")

    def _copy_later(self, func: Any, args: Any, kwargs: Any, changed: list[Tensor], overwritten: set[int]) -> Tensor:
        """Note a copy of something that is not in memory, such as a tensor of a file, and do not make it yet."""
        target: Tensor = args[0]
        made: list[tuple[int, Tensor]] = []
        if not overwritten:
            target = torch.empty_strided(target.shape, target.stride(), dtype=target.dtype)
            made = [(0, target)]
        self.notes.add(func, args, kwargs, changed=changed, overwritten=overwritten, made=made)
        self._free(memory_of(target))
        return target

    def read(self, stored: StoredWeights) -> dict[str, Tensor]:
        """Stored tensors, none of them in memory yet, except small ones."""
        found: dict[str, Tensor] = {}
        with self.paused():
            for name in stored:
                found[name] = torch.empty(stored.shape(name), dtype=stored.dtype(name))
                if _counts(found[name]):
                    self.notes.add(stored.__getitem__, (name,), {}, made=[(0, found[name])])
                    self._free(memory_of(found[name]))
                else:
                    found[name] = stored[name]
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In the body tensors are made as always, and kept; those that may be freed must not be used in it."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def finish(self, module: nn.Module) -> DeferredWeights:
        """After the build: move the module's parameters to the meta device, and keep everything else.

        Args:
            module: what was built. Its parameters are replaced, except small ones. Its buffers, and tensors that are
                attributes of its modules, have their values.
        """
        pieces: dict[str, Piece] = {}
        for prefix, owner in module.named_modules():
            for leaf in tree_leaves(vars(owner)):
                if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter) and leaf in self.notes:
                    self._restore(memory_of(leaf), values=True)
                    self._resident.pop(memory_of(leaf), None)  # it belongs to the module from now on
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter in self.notes:
                    pieces[f"{prefix}.{name}" if prefix else name] = Piece.of(parameter)
                    owner._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for memory in list(self._resident):
            self._free(memory)
        return_freed_memory()
        return DeferredWeights(self, pieces)

    def _restore(self, memory: int, *, values: bool) -> None:
        """Put a memory back, with its values or only with its size."""
        entry = self.notes.memories[memory]
        if entry.is_freed:
            source = self.notes.replay(memory) if values else None
            entry.storage.resize_(entry.nbytes)
            if source is not None:
                entry.storage.copy_(source)

    def _free_oldest(self, keep: int) -> None:
        total = sum(self.notes.memories[memory].nbytes for memory in self._resident)
        while total > RESIDENT_BYTES and len(self._resident) > keep:
            memory = next(iter(self._resident))
            total -= self.notes.memories[memory].nbytes
            self._free(memory)

    def _free(self, memory: int) -> None:
        self._resident.pop(memory, None)
        self.notes.memories[memory].storage.resize_(0)
        self.count_freed(self.notes.memories[memory].nbytes)

    def count_freed(self, nbytes: int) -> None:
        """Count what was freed, and from time to time give it back to the system."""
        self._freed_bytes += nbytes
        if self._freed_bytes >= RESIDENT_BYTES:
            self._freed_bytes = 0
            return_freed_memory()


class _RefusePastTorch(TorchFunctionMode):
    """Refuses to hand out a weight's memory past torch, where freeing it would not be seen."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self._notes = notes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and args[0] in self._notes:
            return args[1].setdefault(id(args[0]), args[0].detach().clone())
        if func in _PAST_TORCH and args[0] in self._notes:
            raise NotImplementedError(f"Tensor.{func.__name__} of a weight during the build")
        return func(*args, **(kwargs or {}))


def build_deferred(make: Callable[[], M]) -> tuple[M, DeferredWeights | None]:
    """Build a module whose larger parameters are on the meta device, with what makes their values.

    Args:
        make: builds it, and draws random numbers from torch's default generator only.

    Returns:
        The module, and the values of its parameters on the meta device; None if the libraries do something during the
        build that cannot be done again: then the module is whole, and the log says why.
    """
    start = torch.get_rng_state()
    try:
        with DeferredBuild() as build:
            module = make()
        return module, build.finish(module)
    except (NotImplementedError, RuntimeError) as error:
        _log.warning("the model is built whole on every rank, 4 bytes a parameter: %s", error)
        torch.set_rng_state(start)
        return make(), None


def read_deferred(source: Path | StoredWeights) -> dict[str, Tensor] | None:
    """Tensors that are read when they are used; None outside a `DeferredBuild`, and for files of other kinds.

    Args:
        source: a safetensors file, or what else stores weights.
    """
    build = DeferredBuild.entered
    if build is None or build.is_paused or (isinstance(source, Path) and source.suffix != ".safetensors"):
        return None
    return build.read(SafetensorsFile(source) if isinstance(source, Path) else source)


@contextmanager
def kept_whole() -> Iterator[None]:
    """In the body a library may make tensors in threads of its own, also during a `DeferredBuild`: they are kept."""
    build = DeferredBuild.entered
    if build is None:
        yield
    else:
        with build.paused():
            yield


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation changes, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return []
    given = {argument.name: value for argument, value in zip(schema.arguments, args)} | kwargs
    changed = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]


def _counts(tensor: Tensor) -> bool:
    """Whether a new tensor's memory may be freed."""
    storage = tensor.untyped_storage()
    return tensor.device.type == "cpu" and storage.nbytes() >= SMALLEST_BYTES and storage.resizable()
