"""What a served model derives from its weights once they are loaded, as multi-head latent attention splits `kv_b_proj`.

SGLang calls that step `post_load_weights`, a method of the model, and `load_weights` ends with it. Weights that arrive
by other means need a call of it afterwards. What it writes is found by watching: the plain tensors of the model's
modules that change once all weights have.

Invariant: after `refresh` every element of what was found is what the model derives from the weights it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from miles_spec.sync.digest import digests
from miles_spec.sync.dtypes import bits
from miles_spec.sync.runs import runs_of, touches

HOOK = "post_load_weights"


@contextmanager
def postponed(model: nn.Module) -> Iterator[None]:
    """Within it the model's `load_weights` derives nothing."""
    if not hasattr(model, HOOK):
        yield
        return
    own = vars(model).get(HOOK)
    setattr(model, HOOK, lambda *_, **__: None)
    try:
        yield
    finally:
        delattr(model, HOOK)
        if own is not None:
            setattr(model, HOOK, own)


class Derived:
    """The tensors that one model derives from its weights."""

    def __init__(self, addresses: Mapping[str, int]) -> None:
        self._addresses = addresses

    @property
    def names(self) -> tuple[str, ...]:
        """Modules' paths and attributes."""
        return tuple(self._addresses)

    @classmethod
    def find(cls, model: nn.Module, weights: Mapping[str, Tensor], memory: Tensor) -> Derived:
        """Finds them by inverting all bits of `weights` and back. `memory` are the joined runs of all weights and
        buffers. Raises `ValueError` if what is derived could not be kept up to date or what is served be verified."""
        if not hasattr(model, HOOK):
            return cls({})
        kept = digests(weights.items())
        _derive(model)  # which may make them
        now = digests(weights.items())
        if changed := [name for name in kept if now[name] != kept[name]]:
            raise ValueError(f"the engine changes {changed[0]!r} after it has loaded it, in its {HOOK}")
        before = _addresses(model, memory)
        seen = []
        for _ in range(2):
            _invert(weights.values())
            _derive(model)
            if _addresses(model, memory) != before:
                moved = sorted(dict(_addresses(model, memory).items() ^ before.items()))
                raise ValueError(f"the engine gives {moved[0]!r} new memory each time it derives it from its weights")
            seen.append(digests(_plain(model, before).items()))
        return cls({name: address for name, address in before.items() if seen[0][name] != seen[1][name]})

    def refresh(self, model: nn.Module) -> None:
        """Has `model` derive them from the weights it holds, twice, each time over the inverted bits of what was there:
        the two come out alike only if all of it was written. Raises `ValueError` if not."""
        if not hasattr(model, HOOK):
            return
        seen = []
        for _ in range(2):
            _invert(self._still(model).values())
            _derive(model)
            seen.append(digests(self._still(model).items()))
        if stale := [name for name in self._addresses if seen[0][name] != seen[1][name]]:
            raise ValueError(f"the engine did not derive all of {stale[0]!r} from the weights that were loaded")

    def _still(self, model: nn.Module) -> dict[str, Tensor]:
        tensors = _plain(model, self._addresses)
        for name, address in self._addresses.items():
            if name not in tensors or tensors[name].data_ptr() != address:
                raise ValueError(f"the engine has moved {name!r}, which it derives from its weights; learn again")
        return tensors


def _plain(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The floating tensors that modules have as plain attributes; only those of `names` if given."""
    found = {}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta:
                found[f"{path}.{attribute}" if path else attribute] = value
    return found if names is None else {name: found[name] for name in names if name in found}


def _addresses(model: nn.Module, memory: Tensor) -> dict[str, int]:
    """Of the plain tensors that are no views of weights or buffers."""
    return {n: t.data_ptr() for n, t in _plain(model).items() if t.numel() and not touches(memory, runs_of(t))}


def _invert(tensors: Iterable[Tensor]) -> None:
    """Inverts all bits in place, of what lies in one place once."""
    for tensor in {tensor.data_ptr(): tensor for tensor in tensors}.values():
        bits(tensor).bitwise_not_()


def _derive(model: nn.Module) -> None:
    try:
        getattr(model, HOOK)()
    except Exception as error:
        raise ValueError(f"the engine's {HOOK} fails: {type(error).__name__}: {error}") from error
