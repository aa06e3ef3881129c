"""Where a checkpoint's tensors lie in the memory of a served model, found by watching the model's own loader.

Each tensor is loaded once, filled with random numbers, and every copy made on the way is recorded: fused matrices,
padded vocabularies and tensor-parallel shards need no table of names. From then on the served memory itself can be
asked what it holds. Learning overwrites all weights, so an engine that ignores a push is found out.

A tensor for which the loader did nothing but copy is from then on copied straight to its places, all of a bucket in one
call; so is one that the loader copies only in a row with others, once all of them have come. Where it did anything
else, the loader itself gets the tensor every time. What the model derives after loading is in `derived.py`.

Invariant: a digest is reported only of bytes that lie in the model's memory, in the place where its loader put them.
What cannot be compared with what was sent, a tensor scaled, transposed or quantised on the way, is refused by name.

Legend: a *source* is the tensor that is given to the model's loader, contiguous, as a checkpoint has it.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from miles_spec.sync.derived import Derived, postponed
from miles_spec.sync.digest import Digester, digest, digests
from miles_spec.sync.dtypes import bits, dtype_name, dtype_of
from miles_spec.sync.runs import covers, joined, overlaps, runs_of, touches
from miles_spec.sync.watch import Watch
from miles_spec.types import TensorMeta

WAITING = 8
"""So many of the tensors that the loader has only taken note of are offered again with the next one; those that belong
together are close to each other in a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copy:
    """One copy that the loader makes for one tensor."""

    served: Tensor
    """The view of the model's memory that is written."""
    strides: tuple[int, ...]
    """Of the slice of the source, in elements; its shape is that of `served`."""
    offset: int
    """Of the slice's first element, in elements."""
    whole: bool
    """Whether the slice is the source from end to end, in order."""

    def slice_of(self, source: Tensor) -> Tensor:
        if self.whole and self.served.shape == source.shape:
            return source
        return source.as_strided(self.served.shape, self.strides, source.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where one tensor goes."""

    shape: tuple[int, ...]
    """Of the tensor as it is pushed."""
    dtype: torch.dtype
    """As it is served; it has to be pushed in this one."""
    copies: tuple[_Copy, ...]
    """At least one."""
    straight: bool
    """The model's loader passes over it: it is loaded into the parameter of the same name."""
    plain: bool
    """Nothing is done for it but its copies."""

    @property
    def sliced(self) -> bool:
        """Whether some copy is of a part only, as with tensor parallelism."""
        return not all(copy.whole for copy in self.copies)

    def views(self, name: str) -> list[tuple[str, Tensor]]:
        """What the copies wrote, in the source's shape where it is all of it, under names that contain `name`."""
        return [
            (f"{i} {name}", copy.served.reshape(self.shape) if copy.whole else copy.served)
            for i, copy in enumerate(self.copies)
        ]


class _Refused(Exception):
    """A tensor has no place that could be verified; the message is the fault."""


class _Alone(_Refused):
    """The loader copies nothing of a tensor that comes by itself."""


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by all their names, and plain tensors that stand where a `weight` does, as SGLang's reduced draft head
    is one."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        plain = vars(module).get("weight")
        if isinstance(plain, Tensor):
            named[f"{path}.weight" if path else "weight"] = plain
    return named


def _memory(model: nn.Module) -> Tensor:
    """All bytes of the weights and buffers of `model`."""
    return joined(runs_of(t) for t in [*_weights(model).values(), *model.buffers()])


def _addresses(model: nn.Module) -> dict[str, int]:
    return {name: weight.data_ptr() for name, weight in _weights(model).items()}


def _random(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same on all ranks, and no draw from the engine's own generators."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    empty = torch.empty(tuple(shape), dtype=dtype, device=device)
    # integers may be indices, which the loader uses
    return empty.normal_(generator=generator) if dtype.is_floating_point else empty.random_(0, 2, generator=generator)


def _main_dtype(model: nn.Module) -> torch.dtype:
    """The floating dtype of most of the parameters."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _load_by_name(parameter: Tensor, tensor: Tensor) -> None:
    """As SGLang's models load one parameter: by the loader it carries, which knows of padding and shards."""
    loader = getattr(parameter, "weight_loader", None)
    if loader is not None:
        loader(parameter, tensor)
    elif parameter.shape == tensor.shape:
        parameter.data.copy_(tensor)


class _Learner:
    """Loads one tensor after the other and finds its place."""

    def __init__(self, model: nn.Module, owner: nn.Module | None) -> None:
        self.model = model
        self.parameters = _weights(model)
        self.foreign = joined([]) if owner is None else _memory(owner)
        self.memory = _memory(model)
        self.device = next(iter(self.parameters.values())).device
        self.dtype = _main_dtype(model)
        self.filled: list[Tensor] = []
        self._waiting: dict[str, Tensor] = {}

    def place(self, name: str, meta: TensorMeta) -> dict[str, _Place]:
        """That of `name` and of those before that had waited for it. Raises `_Refused`."""
        dtype = dtype_of(meta.dtype)
        if dtype.is_floating_point:
            dtype = self.dtype
        try:
            place = self._load(name, meta, dtype)
            if isinstance(place, torch.dtype):  # as norms and routers, which may be served in float32
                place = self._load(name, meta, place)
        except _Alone:
            self._waiting[name] = _random(name, meta.shape, dtype, self.device)
            if not (places := self._load_together(name)):
                raise
            return places
        if isinstance(place, torch.dtype):
            raise _Refused(f"tensor {name!r} lands in another dtype each time it is loaded")
        return {name: place}

    def _load(self, name: str, meta: TensorMeta, dtype: torch.dtype) -> _Place | torch.dtype:
        """The place, or the dtype to try again with, which is the served memory's."""
        if dtype.is_floating_point and dtype.itemsize < 2:
            raise _Refused(
                f"the engine serves tensor {name!r} as {dtype_name(dtype)}, quantised; serve the model unquantised, so "
                "that what it holds can be compared with what is sent"
            )
        source = _random(name, meta.shape, dtype, self.device)
        before = digest(source)
        watch = self._watched(name, lambda: self.model.load_weights([(name, source)]))  # type: ignore[operator]
        plain = watch.plain
        straight = not watch.copies and name in self.parameters
        if straight:
            watch = self._watched(name, lambda: _load_by_name(self.parameters[name], source))
            plain = plain and watch.plain
        if not watch.copies:
            raise _Alone(f"the engine has no place for tensor {name!r}")
        for to, _ in watch.copies:
            if to.dtype != dtype and dtype.is_floating_point and to.dtype.is_floating_point:
                return to.dtype
        place = self._place(name, source, before, watch.copies, straight=straight, plain=plain)
        self.filled += [runs_of(fill) for fill in watch.fills]
        return place

    def _load_together(self, last: str) -> dict[str, _Place]:
        """The places of those that wait, and are copied now that `last` has come too."""
        self._waiting = sources = dict(list(self._waiting.items())[-WAITING:])
        before = {name: digest(source) for name, source in sources.items()}
        watch = self._watched(last, lambda: self.model.load_weights(list(sources.items())))  # type: ignore[operator]
        names = {source.untyped_storage().data_ptr(): name for name, source in sources.items()}
        copies: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for to, values in watch.copies:
            copies.setdefault(names.get(values.untyped_storage().data_ptr(), last), []).append((to, values))
        if not copies:
            return {}
        if not watch.plain:
            raise _Refused(f"the engine copies tensor {last!r} only together with others, and does more than that")
        places = {
            name: self._place(name, sources[name], before[name], own, straight=False, plain=True)
            for name, own in copies.items()
        }
        self._waiting = {name: source for name, source in sources.items() if name not in places}
        self.filled += [runs_of(fill) for fill in watch.fills]
        return places

    def _place(
        self,
        name: str,
        source: Tensor,
        before: str,
        copies: Sequence[tuple[Tensor, Tensor]],
        *,
        straight: bool,
        plain: bool,
    ) -> _Place:
        """Where `source`, whose digest was `before`, went with `copies`. Raises `_Refused`."""
        for to, _ in copies:
            if to.dtype != source.dtype:
                theirs = dtype_name(to.dtype)
                raise _Refused(f"the engine turns tensor {name!r} from {dtype_name(source.dtype)} into {theirs}")
        namesake = self.parameters.get(name)
        if namesake is not None and namesake.shape == source.shape:
            own = joined([runs_of(namesake)])
            if not any(touches(own, runs_of(to)) for to, _ in copies):
                raise _Refused(f"the engine loads tensor {name!r} elsewhere than into its parameter of that name")
        changed = _Refused(
            f"the engine changes tensor {name!r} as it loads it (transposes, scales, quantises or pads it), so that "
            "what it serves cannot be compared with what is sent"
        )
        if digest(source) != before:
            raise changed
        found = []
        for to, values in copies:
            copy = self._copy(to, values, source)
            if copy is None or not torch.equal(bits(to), bits(copy.slice_of(source))):
                raise changed
            found.append(copy)
        return _Place(
            shape=tuple(source.shape), dtype=source.dtype, copies=tuple(found), straight=straight, plain=plain
        )

    def _watched(self, name: str, load: Callable[[], object]) -> Watch:
        """What `load` does; of its copies those into the model's memory. Raises `_Refused`."""
        watch = Watch(self.foreign)
        try:
            with postponed(self.model), watch:
                load()
        except Exception as error:
            raise _Refused(f"the engine's loader fails on tensor {name!r}: {type(error).__name__}: {error}") from error
        if watch.trespassed:
            raise _Refused(f"tensor {name!r} would overwrite a tensor that belongs to the target; do not push it")
        made, watch.copies = watch.copies, []
        for to, values in made:
            if to.numel() and covers(self.memory, runs_of(to)):
                watch.copies.append((to, values))
            elif to.numel():
                watch.plain = False
        return watch

    def own(self) -> dict[str, Tensor]:
        """The floating weights that the model shares with no owner."""
        floats = {name: weight for name, weight in self.parameters.items() if weight.dtype.is_floating_point}
        return {name: weight for name, weight in floats.items() if not touches(self.foreign, runs_of(weight))}

    def _copy(self, to: Tensor, values: Tensor, source: Tensor) -> _Copy | None:
        """Which slice of `source` is copied; None if the values are not in its memory or out of its order."""
        contiguous = torch.empty(to.shape, device="meta").stride()
        if values.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
            # a copy on the way, such as `contiguous()`: the bits of the whole are compared instead
            whole = to.numel() == source.numel()
            return _Copy(served=to, strides=contiguous, offset=0, whole=True) if whole else None
        offset = values.storage_offset() - source.storage_offset()
        steps = [stride for stride, size in zip(values.stride(), values.shape, strict=True) if size > 1]
        if values.shape != to.shape or steps != sorted(steps, reverse=True) or 0 in steps:
            return None
        whole = values.numel() == source.numel() and values.is_contiguous()
        return _Copy(served=to, strides=values.stride(), offset=int(offset), whole=whole)


class Placement:
    """The places of all tensors of one role in one model, on one rank."""

    def __init__(self, model: nn.Module, places: Mapping[str, _Place], derived: Derived, faults: Sequence[str]) -> None:
        self._model = weakref.ref(model)
        self._places = places
        self._derived = derived
        self._addresses = _addresses(model)
        self._sliced: dict[str, tuple[str, list[str]]] = {}
        self.faults = tuple(faults)
        """Sentences; empty if every tensor has a place and every element of the model is reached."""

    @classmethod
    def learn(cls, model: nn.Module, metas: Mapping[str, TensorMeta], owner: nn.Module | None = None) -> Placement:
        """Finds the place of every tensor in `metas` by loading random numbers into all of `model`.

        `model` has SGLang's `load_weights(named)`. What it shares with `owner` (a draft shares embedding and head with
        its target) need not be pushed, and is not written. All that is wrong is in `faults`; only a model without
        parameters raises, `ValueError`.
        """
        if next(model.parameters(), None) is None:
            raise ValueError("the engine's model has no parameters")
        learner = _Learner(model, owner)
        before = _addresses(model)
        places: dict[str, _Place] = {}
        refused: dict[str, str] = {}
        for name, meta in metas.items():
            try:
                places |= learner.place(name, meta)
            except (_Refused, ValueError) as error:
                refused[name] = str(error)
        faults = [fault for name, fault in refused.items() if name not in places]
        runs = {name: joined(runs_of(copy.served) for copy in place.copies) for name, place in places.items()}
        faults += [f"tensors {a!r} and {b!r} are loaded into the same place" for a, b in overlaps(runs)]
        reached = joined([*runs.values(), *learner.filled])
        for name, parameter in _weights(model).items():
            if before.get(name) != parameter.data_ptr():
                faults.append(f"the engine gives parameter {name!r} new memory when it loads it")
            elif not covers(reached, runs_of(parameter)) and not covers(learner.foreign, runs_of(parameter)):
                faults.append(f"served tensor {name!r} is reached by no pushed tensor, or not in all its elements")
        derived = Derived({})
        if not faults:
            try:
                derived = Derived.find(model, learner.own(), learner.memory)
            except ValueError as error:
                faults.append(str(error))
        return cls(model, places, derived, faults)

    def served(self) -> dict[str, TensorMeta]:
        """In which shape and dtype each tensor has to be pushed."""
        return {
            name: TensorMeta(shape=place.shape, dtype=dtype_name(place.dtype)) for name, place in self._places.items()
        }

    def load(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Puts one bucket where the model's own loader does; that memory has moved shows in `digests`. Raises
        `ValueError` before anything is written for a tensor that was not learned or has another shape or dtype."""
        for name, tensor in named:
            place = self._places.get(name)
            if place is None:
                raise ValueError(f"tensor {name!r} was not learned; learn its place first")
            if tuple(tensor.shape) != place.shape or tensor.dtype != place.dtype:
                raise ValueError(
                    f"tensor {name!r} comes as {dtype_name(tensor.dtype)}{list(tensor.shape)}, but the engine serves "
                    f"it as {dtype_name(place.dtype)}{list(place.shape)}"
                )
        named = [(name, tensor.detach().contiguous()) for name, tensor in named]
        copies = [
            (copy, tensor) for name, tensor in named if self._places[name].plain for copy in self._places[name].copies
        ]
        if copies:
            torch._foreach_copy_(
                [bits(copy.served) for copy, _ in copies], [bits(copy.slice_of(tensor)) for copy, tensor in copies]
            )
        theirs = [(name, tensor) for name, tensor in named if not self._places[name].plain]
        if theirs:
            self._load_as_it_does(theirs)
        self._note_slices(named)

    def _load_as_it_does(self, named: Sequence[tuple[str, Tensor]]) -> None:
        model = self._still()
        for name, tensor in named:
            if self._places[name].straight:
                _load_by_name(_weights(model)[name], tensor)
        theirs = [(name, tensor) for name, tensor in named if not self._places[name].straight]
        if theirs:
            model.load_weights(theirs)  # type: ignore[operator]

    def digests(self) -> dict[str, str]:
        """Name to digest of what is served now, of every tensor that was learned.

        Of a tensor of which this model holds slices only, the digest of what was received, if every slice held just
        that after its load and is unchanged since; otherwise a remark in its place. Before that the model derives anew
        what it keeps besides its weights. Raises `ValueError` if it does not, or if parameters have moved.
        """
        self._derived.refresh(self._still())
        views = {name: place.views(name) for name, place in self._places.items()}
        read = digests(view for each in views.values() for view in each)
        result = {}
        for name, place in self._places.items():
            now = [read[view] for view, _ in views[name]]
            if not place.sliced:
                result[name] = now[0] if len(set(now)) == 1 else f"different in its {len(now)} places"
            elif name not in self._sliced:
                result[name] = "not loaded in full since it was learned"
            else:
                received, then = self._sliced[name]
                result[name] = received if now == then else "changed since it was loaded"
        return result

    def _note_slices(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Compares the slices just loaded with their source, and keeps the digests of both."""
        same: dict[str, Tensor] = {}
        digester = Digester()
        for name, tensor in named:
            place = self._places[name]
            if place.sliced:
                self._sliced.pop(name, None)
                parts = [(copy.served, copy.slice_of(tensor).to(copy.served.device)) for copy in place.copies]
                same[name] = torch.stack([(bits(served) == bits(part)).all() for served, part in parts]).all()
                for view, served in [("source " + name, tensor), *place.views(name)]:
                    digester.add(view, served)
        if same:
            read = digester.read()
            for name, equal in zip(same, torch.stack(list(same.values())).tolist(), strict=True):
                if equal:
                    then = [read[view] for view, _ in self._places[name].views(name)]
                    self._sliced[name] = read["source " + name], then

    def _still(self) -> nn.Module:
        """The model. Raises `ValueError` if the places no longer hold."""
        model = self._model()
        if model is None:
            raise ValueError("the engine has dropped the model whose places were learned; learn again")
        now = _addresses(model)
        moved = [name for name, address in self._addresses.items() if now.get(name) != address]
        if moved:
            raise ValueError(f"the engine has moved parameter {moved[0]!r} since its place was learned; learn again")
        return model
