"""Whether the weight files of a component hold the weights that its config.json asks for. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_omni.diffusion.catalog.weight_headers import StoredWeight
from vllm_omni.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a weight -> its shape."""


def linear_shapes(name: str, num_out: int, num_in: int, has_bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Weights of a linear layer."""
    weight = {f"{name}.weight": (num_out, num_in)}
    return {**weight, f"{name}.bias": (num_out,)} if has_bias else {**weight}


@dataclass(frozen=True)
class LayerList:
    """Equal layers, whose weights are named `PREFIX.NUMBER.NAME`."""

    key: str
    """The key of config.json that says how many there are."""
    count: int
    shapes: Shapes
    """Shapes of each layer's weights, by the name behind the number."""


@dataclass(frozen=True)
class ExpectedWeights:
    """Weights that follow from a component's config.json."""

    shapes: Shapes
    layers: Mapping[str, LayerList] = field(default_factory=dict)
    """By the prefix of their names."""
    anchor: str = ""
    """End of the name of one weight, for checkpoints in which all names may begin with a prefix: what stands before it.
    Empty: there is no prefix."""
    is_complete: bool = False
    """Whether every weight of the component is among these."""

    def check(self, component: str, stored: Mapping[str, StoredWeight]) -> None:
        """Raise ConfigError, with the first difference, for weight files that do not hold these weights."""
        prefix = self._prefix(component, stored)
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
            elif self.is_complete or name.startswith(lists):
                raise ConfigError(f"{weight.file} has a weight that the model does not take: {name}")
        check_none_missing(component, [name for name in expected if name not in stored])

    def _prefix(self, component: str, stored: Mapping[str, StoredWeight]) -> str:
        if not self.anchor:
            return ""
        found = next((name for name in stored if name.endswith(self.anchor)), None)
        if found is None:
            raise ConfigError(f"{component}/ lacks the weight {self.anchor} of the model")
        return found.removesuffix(self.anchor)


def check_none_missing(component: str, missing: Sequence[str], owner: str = "model") -> None:
    """Raise ConfigError, with the first names, if weights of the component are `missing`. owner: their module."""
    if missing:
        raise ConfigError(
            f"{component}/ lacks {len(missing)} weights of the {owner}, among them {', '.join(missing[:3])}"
        )


def _expected_layers(
    component: str, path: str, layers: LayerList, stored: Mapping[str, StoredWeight]
) -> dict[str, tuple[int, ...]]:
    """Weights of all layers. Their number is compared first: a wrong one may be a billion."""
    numbers = {name.removeprefix(f"{path}.").partition(".")[0] for name in stored if name.startswith(f"{path}.")}
    if len(numbers) != layers.count:
        raise ConfigError(
            f"{component}/config.json: {layers.key} is {layers.count}, but the weight files have {len(numbers)} {path}"
        )
    return {f"{path}.{i}.{name}": shape for i in range(layers.count) for name, shape in layers.shapes.items()}
