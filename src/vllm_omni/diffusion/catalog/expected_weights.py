"""Weights that a component's config.json requires, and their check against its weight files. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_omni.diffusion.catalog.weight_files import ShardIndex, StoredWeight
from vllm_omni.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a weight -> its shape."""


def linear_shapes(name: str, num_out: int, num_in: int, has_bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a linear layer."""
    weight = {f"{name}.weight": (num_out, num_in)}
    return {**weight, f"{name}.bias": (num_out,)} if has_bias else {**weight}


@dataclass(frozen=True)
class LayerList:
    """List of layers with equal shapes, whose weights are named `PREFIX.NUMBER.NAME`."""

    key: str
    """Key of config.json for the number of layers."""
    count: int
    shapes: Shapes
    """Shapes of one layer's weights, by the part of the name after the number."""


@dataclass(frozen=True)
class ExpectedWeights:
    """Names and shapes of weights that follow from a component's config.json."""

    shapes: Shapes
    layers: Mapping[str, LayerList] = field(default_factory=dict)
    """Prefix of the weights' names -> layers."""
    anchor: str = ""
    """Name of one weight, for checkpoints whose names may all have a prefix: the prefix is the part before this name.
    Empty: no prefix."""
    is_complete: bool = False
    """Whether the component may have no other weights."""
    unread: tuple[str, ...] = ()
    """Ends of the names of further weights that some checkpoints have and the model does not read."""

    def all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight, by its name without prefix."""
        shapes = dict(self.shapes)
        for path, layers in self.layers.items():
            shapes |= _layer_shapes(path, layers)
        return shapes

    def check(self, component: str, stored: Mapping[str, StoredWeight], index: ShardIndex | None = None) -> None:
        """Raise ConfigError, with the first difference, if the stored weights differ from these.

        index: tells in which file a missing weight should be.
        """
        if index is not None:
            self._check_index(component, stored, index)
        anchor = next((name for name in stored if name.endswith(self.anchor)), None) if self.anchor else ""
        if anchor is None:
            raise ConfigError(f"{component}/ lacks the weight {self.anchor} of the model")
        prefix = anchor.removesuffix(self.anchor)
        expected = {prefix + name: shape for name, shape in self.shapes.items()}
        for path, layers in self.layers.items():
            expected |= _expected_layers(component, prefix + path, layers, stored)
        lists = tuple(f"{prefix}{path}." for path in self.layers)
        for name, weight in stored.items():
            if name in expected:
                if weight.shape != expected[name]:
                    raise ConfigError(
                        f"{weight.file}: {name} has shape {weight.shape}, by config.json it is {expected[name]}"
                    )
            elif (self.is_complete or name.startswith(lists)) and not name.endswith(self.unread):
                raise ConfigError(f"{weight.file} has a weight that the model does not take: {name}")
        check_none_missing(component, [name for name in expected if name not in stored])

    def _check_index(self, component: str, stored: Mapping[str, StoredWeight], index: ShardIndex) -> None:
        """Raise ConfigError for a weight that no file holds and that the index places in one."""
        lost = [name for name in index.files if name not in stored]
        if not lost:
            return
        prefix = ""
        if self.anchor:
            prefix = next((name.removesuffix(self.anchor) for name in index.files if name.endswith(self.anchor)), "")
        shapes = self.all_shapes()
        # An index may also name weights that the model does not have.
        if needed := [name for name in lost if name.removeprefix(prefix) in shapes]:
            more = f" and {len(needed) - 1} more" if len(needed) > 1 else ""
            raise ConfigError(
                f"{component}/{index.files[needed[0]]} lacks {needed[0]}{more}, which {index.place} places in it"
            )


def check_none_missing(component: str, missing: Sequence[str], owner: str = "model") -> None:
    """Raise ConfigError, with the first names, if `missing` has names. `owner`: the module that needs the weights."""
    if missing:
        raise ConfigError(
            f"{component}/ lacks {len(missing)} weights of the {owner}, among them {', '.join(missing[:3])}"
        )


def _expected_layers(
    component: str, path: str, layers: LayerList, stored: Mapping[str, StoredWeight]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of all layers. Compares their number first: a wrong one may be a billion."""
    numbers = {name.removeprefix(f"{path}.").partition(".")[0] for name in stored if name.startswith(f"{path}.")}
    if len(numbers) != layers.count:
        raise ConfigError(
            f"{component}/config.json: {layers.key} is {layers.count}, but the weight files have {len(numbers)} {path}"
        )
    return _layer_shapes(path, layers)


def _layer_shapes(path: str, layers: LayerList) -> dict[str, tuple[int, ...]]:
    return {f"{path}.{i}.{name}": shape for i in range(layers.count) for name, shape in layers.shapes.items()}
