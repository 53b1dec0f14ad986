"""Building a model without room for all of its weights: each is made again, bit for bit, when it is asked for.

While a model is built inside `DeferredBuild`, the libraries run as always: every operation is carried out, on real
memory, with the numbers of torch's own generator. What was done is noted. When the weights that are in memory exceed
`RESIDENT_BYTES`, the oldest are freed; one that is needed once more is made again by the noted operations, each random
one from the generator's state before it. So the numbers are those of a build that keeps everything, whatever the
libraries do on the way: drawing twice, drawing until all numbers lie in a range, scaling layers afterwards, resampling
what a file holds. Tensors of a safetensors file are read one at a time (`open_weights`).

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_log = logging.getLogger(__name__)

RESIDENT_BYTES = 2**26
"""Weights that may stay in memory during the build, beside those that an operation is using."""
SMALLEST_BYTES = 2**14
"""Tensors below this are never freed: norms, biases, tokens."""

_aten = torch.ops.aten
_OVERWRITES = {_aten.uniform_.default, _aten.normal_.default, _aten.zero_.default, _aten.fill_.Scalar,
               _aten.fill_.Tensor, _aten.copy_.default}  # fmt: skip
"""Operations after which a tensor's earlier values do not matter. All others are taken to read what they write to."""
_LOOK_ONLY = {_aten.detach.default, _aten.alias.default, _aten.view.default}
"""Operations that need no values: they also run on memory that was freed."""
_PAST_TORCH = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.data_ptr, torch.Tensor.__array__,
               torch.Tensor.__dlpack__}  # fmt: skip
"""Functions that read memory without an operation of torch, so that it could be freed under them."""

M = TypeVar("M", bound=nn.Module)


@dataclass
class _Memory:
    """One tensor's memory, which may be freed and made again."""

    storage: torch.UntypedStorage
    nbytes: int
    writers: list[tuple[int, bool]] = field(default_factory=list)
    """(number of an operation that wrote to it, whether it overwrote all of it), in their order."""


@dataclass(frozen=True)
class _Piece:
    """A tensor that lies in a `_Memory`, as an argument or a result of a noted operation."""

    memory: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """The same tensor on other memory."""
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class _Given:
    """An argument of a noted operation that is kept as it is; it must not have changed when it is read again."""

    tensor: Tensor
    version: int


@dataclass(frozen=True)
class _Operation:
    run: Callable[..., Any]
    args: Any
    kwargs: Any
    state: Tensor | None
    """Of torch's generator before it, if it draws from it."""
    reads: frozenset[int]
    """Memories that must exist before it runs, those that it changes in part included."""
    overwrites: tuple[_Piece, ...]
    makes: tuple[tuple[int, _Piece], ...]
    """New memories: (place among its results, what lies there)."""


class DeferredWeights:
    """Makes the values of a model's parameters, one at a time; the same on every rank, without communication."""

    def __init__(self, build: DeferredBuild, pieces: dict[str, _Piece]) -> None:
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
        return piece.on(self._build.replay(piece.memory))


class DeferredBuild(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While this is entered, tensors that torch makes may be freed and made again (see the module's docstring).

    Raises:
        NotImplementedError: from within the build, by what cannot be made again.
    """

    _entered: DeferredBuild | None = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memories: dict[int, _Memory] = {}
        self._resident: OrderedDict[int, None] = OrderedDict()
        self._operations: list[_Operation] = []
        self.is_paused = False
        self._guard = _RefusePastTorch(self)

    def __enter__(self) -> DeferredBuild:
        DeferredBuild._entered = self
        self._guard.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._guard.__exit__(*error)  # type: ignore[no-untyped-call]
        DeferredBuild._entered = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_paused or func in _LOOK_ONLY:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(a, torch.UntypedStorage) and a._cdata in self._memories for a in args):
            raise NotImplementedError(f"{func} lays a tensor on a weight's memory")
        known = {key for tensor in tensors if (key := _key(tensor)) in self._memories}
        written = _written(func, args, kwargs)
        changed = [tensor for tensor in written if _key(tensor) in self._memories]
        whole = [t for t in changed if func in _OVERWRITES and t.is_contiguous() and _fills(t, self._memories)]
        overwritten = {_key(tensor) for tensor in whole}
        reads = {_key(t) for t in tensors if not any(t is w for w in whole)} & known
        if changed and len(changed) < len(written):
            raise NotImplementedError(f"{func} changes both a weight and another tensor")
        if func in (_aten.copy_.default, _aten.clone.default) and self._is_for_later(reads, overwritten, args):
            return self._later(func, args, kwargs, reads, whole)
        for key in known:
            self._restore(key, values=key in reads)
        state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            if kwargs.get("generator") is not None:
                raise NotImplementedError(f"{func} draws from a generator of its own")
            state = torch.get_rng_state()
        versions = {id(tensor): tensor._version for tensor in tensors}
        result = func(*args, **kwargs)
        if any(self._memories[key].storage.nbytes() != self._memories[key].nbytes for key in known):
            raise NotImplementedError(f"{func} changes the size of a weight's memory")
        inputs = {_key(tensor) for tensor in tensors}
        made = [
            (place, leaf)
            for place, leaf in enumerate(tree_leaves(result))
            if isinstance(leaf, Tensor) and _key(leaf) not in inputs and self._counts(leaf)
        ]
        if made and len(changed) < len(written):
            raise NotImplementedError(f"{func} makes a weight and changes another tensor")
        if changed or made:
            self._note(func, args, kwargs, state, reads, whole, made, versions)
        for key in (*known, *(_key(leaf) for _, leaf in made)):
            self._resident[key] = None
            self._resident.move_to_end(key)
        self._free_oldest(keep=len(known) + len(made))
        return result

    def _is_for_later(self, reads: set[int], overwritten: set[int], args: Any) -> bool:
        """Whether a copy is of something that is not in memory, such as a tensor of a file, to a place of its own."""
        apart = not overwritten & reads and (len(args) == 1 or bool(overwritten))
        return apart and bool(reads - self._resident.keys())

    def _later(self, func: Any, args: Any, kwargs: Any, reads: set[int], whole: list[Tensor]) -> Tensor:
        """Note a copy without making it: what it writes to counts as freed."""
        made: list[tuple[int, Tensor]] = []
        target: Tensor = args[0]
        if not whole:
            target = torch.empty_strided(target.shape, target.stride(), dtype=target.dtype)
            made = [(0, target)]
        self._note(func, args, kwargs, None, reads, whole, made)
        self._free(_key(target))
        return target

    def read(self, path: Path) -> dict[str, Tensor]:
        """Tensors of a safetensors file, none of them in memory yet, except small ones."""
        found: dict[str, Tensor] = {}
        with self.paused(), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                piece = file.get_slice(name)
                shape = piece.get_shape()
                dtype = (piece[:0] if shape else file.get_tensor(name)).dtype
                tensor = torch.empty(shape, dtype=dtype)
                if self._counts(tensor):
                    self._note(_read_tensor, (path, name), {}, None, set(), [], [(0, tensor)])
                    self._free(_key(tensor))
                    found[name] = tensor
                else:
                    found[name] = file.get_tensor(name).clone()
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
        pieces: dict[str, _Piece] = {}
        for prefix, owner in module.named_modules():
            for leaf in tree_leaves(vars(owner)):
                if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter) and _key(leaf) in self._memories:
                    self._restore(_key(leaf), values=True)
                    # Its storage belongs to the module from now on; the entry is only needed to make others again.
                    self._resident.pop(_key(leaf), None)
            for name, parameter in owner.named_parameters(recurse=False):
                if _key(parameter) in self._memories:
                    pieces[f"{prefix}.{name}" if prefix else name] = self._piece(parameter)
                    owner._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for key in self._resident:
            self._free(key, forget=False)
        self._resident.clear()
        return DeferredWeights(self, pieces)

    @torch.no_grad()
    def replay(self, key: int, before: int | None = None) -> torch.UntypedStorage:
        """Make the values of a memory again, on other memory, as they were before an operation (None: at the end)."""
        order = self._needed(key, len(self._operations) if before is None else before)
        last = {memory: number for number in order for memory in self._touched(number)}
        real: dict[int, torch.UntypedStorage] = {}
        with torch.random.fork_rng(devices=[]):
            for number in order:
                operation = self._operations[number]
                for piece in operation.overwrites:
                    real.setdefault(piece.memory, _storage(self._memories[piece.memory].nbytes))
                args, kwargs = _as_tensors((operation.args, operation.kwargs), real)
                if operation.state is not None:
                    torch.set_rng_state(operation.state)
                results = tree_leaves(operation.run(*args, **kwargs))
                if operation.run is _aten.empty.memory_format:
                    results[0].zero_()  # never written to in whole: the same on every rank, and each time
                for place, piece in operation.makes:
                    result = results[place]
                    if (tuple(result.shape), result.stride(), result.storage_offset()) != (
                        piece.size, piece.stride, piece.offset,
                    ):  # fmt: skip
                        raise RuntimeError(f"{operation.run} has given a tensor of another layout than before")
                    real[piece.memory] = result.untyped_storage()
                for memory in self._touched(number):
                    if last[memory] == number and memory != key:
                        real.pop(memory, None)
        return real[key]

    def _needed(self, key: int, before: int) -> list[int]:
        """Numbers of the operations that make a memory's values, in their order."""
        needed: set[int] = set()
        waiting = [(key, before)]
        while waiting:
            memory, end = waiting.pop()
            for number, whole in reversed(self._memories[memory].writers):
                if number >= end:
                    continue
                if number not in needed:
                    needed.add(number)
                    waiting.extend((read, number) for read in self._operations[number].reads)
                if whole:
                    break
        return sorted(needed)

    def _touched(self, number: int) -> set[int]:
        operation = self._operations[number]
        return {*operation.reads, *(p.memory for p in operation.overwrites), *(p.memory for _, p in operation.makes)}

    def _note(
        self, func: Any, args: Any, kwargs: Any, state: Tensor | None, reads: set[int], whole: list[Tensor],
        made: list[tuple[int, Tensor]], versions: dict[int, int] | None = None,
    ) -> None:  # fmt: skip
        number = len(self._operations)
        for _, tensor in made:
            storage = tensor.untyped_storage()
            self._memories[_key(tensor)] = _Memory(storage, storage.nbytes(), [(number, True)])
        for tensor in whole:
            self._memories[_key(tensor)].writers.append((number, True))
        for tensor in _written(func, args, kwargs):
            if _key(tensor) in self._memories and not any(tensor is w for w in whole):
                self._memories[_key(tensor)].writers.append((number, False))

        def noted(tensor: Tensor) -> _Piece | _Given:
            if _key(tensor) in self._memories:
                return self._piece(tensor)
            return _Given(tensor, (versions or {}).get(id(tensor), tensor._version))

        args, kwargs = tree_map_only(Tensor, noted, (args, kwargs))
        pieces = tuple(self._piece(tensor) for tensor in whole)
        makes = tuple((place, self._piece(tensor)) for place, tensor in made)
        self._operations.append(_Operation(func, args, kwargs, state, frozenset(reads), pieces, makes))

    def _counts(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        return tensor.device.type == "cpu" and storage.nbytes() >= SMALLEST_BYTES and storage.resizable()

    def _piece(self, tensor: Tensor) -> _Piece:
        return _Piece(
            _key(tensor), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        )

    def _restore(self, key: int, *, values: bool) -> None:
        memory = self._memories[key]
        if memory.storage.nbytes() == memory.nbytes:
            return
        source = self.replay(key) if values else None
        memory.storage.resize_(memory.nbytes)
        if source is not None:
            memory.storage.copy_(source)

    def _free_oldest(self, keep: int) -> None:
        total = sum(self._memories[key].nbytes for key in self._resident)
        while total > RESIDENT_BYTES and len(self._resident) > keep:
            key, _ = self._resident.popitem(last=False)
            total -= self._memories[key].nbytes
            self._free(key, forget=False)

    def _free(self, key: int, forget: bool = True) -> None:
        self._memories[key].storage.resize_(0)
        if forget:
            self._resident.pop(key, None)


class _RefusePastTorch(TorchFunctionMode):
    """Refuses to hand out a weight's memory past torch, where freeing it would not be seen."""

    def __init__(self, build: DeferredBuild) -> None:
        super().__init__()
        self._build = build

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and _key(args[0]) in self._build._memories:
            return args[1].setdefault(id(args[0]), args[0].detach().clone())
        if func in _PAST_TORCH and _key(args[0]) in self._build._memories:
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


def read_deferred(path: Path) -> dict[str, Tensor] | None:
    """Tensors of a safetensors file that are read when they are used; None outside a `DeferredBuild`."""
    build = DeferredBuild._entered
    return None if build is None or build.is_paused or path.suffix != ".safetensors" else build.read(path)


@contextmanager
def kept_whole() -> Iterator[None]:
    """In the body a library may make tensors in threads of its own, also during a `DeferredBuild`: they are kept."""
    build = DeferredBuild._entered
    if build is None:
        yield
    else:
        with build.paused():
            yield


def _read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, in memory of its own: the file is not mapped any more."""
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor.clone()


def _storage(nbytes: int) -> torch.UntypedStorage:
    return torch.empty(nbytes, dtype=torch.uint8).untyped_storage()


def _key(tensor: Tensor) -> int:
    """What tells one piece of memory from another; valid while something holds the memory."""
    key: int = tensor.untyped_storage()._cdata
    return key


def _fills(tensor: Tensor, memories: dict[int, _Memory]) -> bool:
    """Whether a tensor is all that lies in its memory."""
    return tensor.numel() * tensor.element_size() == memories[_key(tensor)].nbytes


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation changes, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return []
    given = {argument.name: value for argument, value in zip(schema.arguments, args)} | kwargs
    changed = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]


def _as_tensors(noted: Any, real: dict[int, torch.UntypedStorage]) -> Any:
    """Arguments of a noted operation, on the memory that replays it."""

    def tensor(value: _Piece | _Given) -> Tensor:
        if isinstance(value, _Piece):
            return value.on(real[value.memory])
        if value.tensor._version != value.version:
            raise RuntimeError("a tensor that a weight was made from has changed since, so it cannot be made again")
        return value.tensor

    return tree_map_only((_Piece, _Given), tensor, noted)
