"""Which method, with which parameters and weights, merges each tensor. No torch.

A recipe may give a parameter by layer, by module and by model. The model's own
counts before the recipe's; where none of its filters fits, the recipe's counts, as in mergekit.
Methods see plain numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import RecipeError, listed, shown
from ..methods import (
    MergeMethod,
    build_method,
    checked_value,
    method_class,
    parameter_fields,
    settled,
)
from ..methods.settings import (
    before,
    check_setting,
    checked_weight,
    depths,
    evaluate,
    is_plain,
)
from ..recipe import ModelRef, Recipe


@dataclass(frozen=True, slots=True)
class Chosen:
    """What merges one tensor.

    Attributes:
        method: with this tensor's parameters.
        weights: one an expert, in the recipe's order.
        base_weight: of the base, where it is listed and takes part; else None.
    """

    method: MergeMethod
    weights: tuple[float, ...]
    base_weight: float | None

    def among(self, numbers: Sequence[int]) -> MergeMethod:
        """Return the method for the experts that have a tensor, each with its own parameters.

        Args:
            numbers: which of the models whose differences are merged, from 0.
        """
        own = {
            item.name: tuple(value[number] for number in numbers)
            for item in parameter_fields(type(self.method)).values()
            if isinstance(value := getattr(self.method, item.name), tuple)
        }
        if all(len(getattr(self.method, name)) == len(values) for name, values in own.items()):
            return self.method
        return replace(self.method, **own)


@dataclass(slots=True)
class Resolver:
    """Resolves the settings of a recipe.

    Args:
        recipe: as written.

    Raises:
        RecipeError: an unknown method, parameter or preset, or a value out of its range.
    """

    recipe: Recipe
    kind: type[MergeMethod] = field(init=False)
    shared: dict[str, Any] = field(init=False)
    weight: Any = field(init=False, default=None)
    _made: dict[Any, Chosen] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.kind = method_class(self.recipe.method)
        given = dict(self.recipe.parameters)
        own = [ref.parameters.items() for ref in self.recipe.models]
        for key, setting in (*given.items(), *(item for items in own for item in items)):
            check_setting(key, setting)
        if self.kind.weighted:
            self.weight = given.pop(self.kind.weight_key, None)
        self.shared = settled(self.kind, given)
        each = [key for key, item in parameter_fields(self.kind).items() if item.metadata["each"]]
        known = [*([self.kind.weight_key] if self.kind.weighted else []), *each]
        for ref in self.recipe.models:
            theirs = [*([] if ref.weight is None else ["weight"]), *ref.parameters]
            if not self.kind.weighted and "weight" in theirs:
                raise RecipeError(
                    f"{self.kind.name} takes no weight for each model: it finds its own. Leave "
                    "'weight' out, or use task_arithmetic, mean or linear."
                )
            if strange := [key for key in theirs if key not in known]:
                raise RecipeError(
                    f"{shown(strange[0])} is not a parameter that {self.kind.name} has for each "
                    f"model; there are: {listed(known) if known else 'none'}. What holds for the "
                    "whole merge stands under the recipe's 'parameters'."
                )

    def at(self, tensor: str = "", depth: float = 0.0) -> Chosen:
        """Return what merges a tensor.

        Args:
            tensor: its name; of none: what holds outside the layers.
            depth: from `depths`.

        Raises:
            RecipeError: a value is of the wrong type, or out of its range.
        """
        fields = parameter_fields(self.kind)
        values: dict[str, Any] = {}
        for key, item in fields.items():

            def convert(value: Any, key: str = key, item: Any = item) -> Any:
                return checked_value(key, value, item)

            found = _value(self.shared.get(key), tensor, depth, convert)
            if item.metadata["each"]:
                own = [
                    _value(ref.parameters.get(key), tensor, depth, convert) for ref in self.others
                ]
                every = [found if value is None else value for value in own]
                found = item.default if found is None else found
                if any(value is not None for value in own):
                    every = [item.default if value is None else value for value in every]
                    found = every[0] if len(set(every)) == 1 else tuple(every)
            if found is not None:
                values[key] = found
        weights = tuple(self._weight(ref, tensor, depth) for ref in self.recipe.experts)
        base = self.recipe.base
        takes_part = base is not None and self.recipe.base_listed and self.kind.base == "input"
        own_weight = self._weight(base, tensor, depth) if base is not None and takes_part else None
        place = (tuple(values.items()), weights, own_weight)
        if place not in self._made:
            chosen = Chosen(build_method(self.recipe.method, values), weights, own_weight)
            all_weights = weights if own_weight is None else (own_weight, *weights)
            if problem := chosen.method.check_weights(all_weights):
                raise RecipeError(problem)
            self._made[place] = chosen
        return self._made[place]

    @property
    def others(self) -> tuple[ModelRef, ...]:
        """The models whose differences to the layout are merged."""
        return self.recipe.experts[self.recipe.base is None :]

    def each(self, names: Iterable[str]) -> dict[str, Chosen]:
        """Return what merges each tensor of a model.

        Raises:
            RecipeError: as `at`; or a number of the whole model is given by layer or module.
        """
        every = list(names)
        found = depths(every)
        chosen = {name: self.at(name, found.get(name, 0.0)) for name in every}
        if any(one.method.counting_passes() for one in chosen.values()):
            several = [key for key, value in self.shared.items() if not is_plain(value)]
            several += [key for ref in self.others for key, value in ref.parameters.items()
                        if key != self.kind.weight_key and not is_plain(value)]  # fmt: skip
            if several:
                raise RecipeError(
                    f"{self.kind.name} counts in the whole model here, so that {several[0]} cannot "
                    "differ between tensors."
                )
        return chosen

    def parameters(self, method: MergeMethod) -> dict[str, Any]:
        """Return every parameter of the whole recipe, as written where it differs by tensor."""
        values = dict(method.parameters())
        for key in [key for key, value in values.items() if isinstance(value, tuple)]:
            del values[key]  # the models have their own
        values |= {k: v for k, v in self.shared.items() if k not in values or not is_plain(v)}
        return values | ({} if self.weight is None else {self.kind.weight_key: self.weight})

    def _weight(self, ref: ModelRef, tensor: str, depth: float) -> float:
        setting = ref.weight if ref.weight is not None else ref.parameters.get(self.kind.weight_key)
        joined = self.weight if setting is None else before(setting, self.weight)
        value = _value(joined, tensor, depth, checked_weight)
        return 1.0 if value is None else float(value)


def check_count(recipe: Recipe, kind: type[MergeMethod]) -> None:
    """Check that a method has the base and the number of models that it needs.

    Raises:
        RecipeError: it has not.
    """
    if recipe.base is None and kind.base == "required":
        raise RecipeError(f"{kind.name} needs a base_model: its changes are differences to it.")
    least, most = kind.models
    own = int(recipe.base is None and kind.base == "input")
    count = len(recipe.experts) - own
    if most == 0:
        alone = len(recipe.experts) + recipe.base_listed
        if alone != 1:
            raise RecipeError(f"{kind.name} merges 1 model, not {alone}: list one under 'models'.")
        return
    if count < least or (most is not None and count > most):
        wanted = f"{least + own}" if least == most else f"at least {least + own}"
        beside = " beside the base" if kind.base == "required" else ""
        raise RecipeError(
            f"{kind.name} merges {wanted} model{'' if wanted == '1' else 's'}{beside}, "
            f"not {len(recipe.experts)}."
        )


def _value(setting: Any, tensor: str, depth: float, convert: Any) -> Any:
    if setting is None:
        return None
    return evaluate(setting, tensor, depth, convert)
