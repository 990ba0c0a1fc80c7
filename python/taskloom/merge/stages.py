"""The table of merge methods: a method is a row that names its stages and its parameters.

Names, defaults and meanings of mergekit's methods are those of mergekit 0.1.5; where the method's paper differs, an option gives the
paper's meaning (docs/merge.md lists both).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from taskloom.merge.plan import Elect, Interpolation, Select, Vote

Kind = Literal["number", "whole", "flag", "choice", "rescale"]
Value = float | int | bool | str | None


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    ``per_model`` ones may be set under a model as well as globally; ``constant`` ones have one value for the whole merge, so no
    gradient and no filter; ``inert`` ones are read for compatibility and change nothing. ``alias`` is a second name that is taken for it.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    per_model: bool = False
    constant: bool = False
    inert: bool = False
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    alias: str | None = None


@dataclass(frozen=True)
class Method:
    """One merge method: stages that do not depend on parameters, and the parameters that set the rest.

    ``base`` says what a base model is to the method: ``required`` (deltas are taken from it), ``member`` (an input like the others)
    or ``none``. ``band`` methods cut the largest entries off as well, ``elected`` ones drop the entries of a minority sign.
    """

    name: str
    title: str
    source: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "member", "none"] = "required"
    select: Select = "all"
    band: bool = False
    elected: bool = False
    vote: Vote = "none"
    interpolation: Interpolation = "none"
    max_models: int | None = None

    @property
    def stages(self) -> str:
        """The stages in a few words, for a table."""
        if self.interpolation != "none":
            return self.interpolation
        if self.base == "none":
            return "copy, scale"
        select: dict[Select, str] = {
            "all": "",
            "magnitude": "band by magnitude" if self.band else "top by magnitude",
            "dropout": "random drop",
            "rank_dropout": "random drop by rank",
        }
        names = {parameter.name for parameter in self.parameters if not parameter.inert}
        parts = [
            "values" if self.base == "member" else "deltas",
            select[self.select],
            "rescale" if "rescale" in names else "",
            "elect sign" if self.elected else "",
            "TALL vote" if self.vote == "tall" else "",
            "weighted sum or mean" if "normalize" in names else "weighted sum",
        ]
        return ", ".join(part for part in parts if part)

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of a name or an alias."""
        return next((parameter for parameter in self.parameters if name in (parameter.name, parameter.alias)), None)


_WEIGHT = Parameter("weight", "number", REQUIRED, "factor of a model's delta (of its values in linear)", per_model=True)
_DENSITY = Parameter("density", "number", 1.0, "share of a delta's entries that is kept", per_model=True, low=0.0, high=1.0)
_GAMMA = Parameter("gamma", "number", 0.01, "share of the largest entries that is removed", per_model=True, low=0.0, high=1.0)
_EPSILON = Parameter("epsilon", "number", 0.15, "half the spread of keep probabilities around density", per_model=True, low=0.0, high=1.0)
_LAMBDA = Parameter("lambda", "number", 1.0, "factor of the merged delta")
_NORMALIZE = Parameter("normalize", "flag", False, "divide by the sum of the weights (of those that survive, after sign election)")
_RESCALE = Parameter(
    "rescale",
    "rescale",
    "none",
    "restore the size of a sparsified delta: l1 (also true; mergekit) or density (1/probability; DARE paper)",
    choices=("none", "density", "l1"),
)
_INT8_MASK = Parameter("int8_mask", "flag", False, "accepted from mergekit recipes, changes nothing", inert=True)
_SCOPE = Parameter(
    "scope", "choice", "tensor", "what entries are ranked against: tensor, row or model", constant=True, choices=("tensor", "row", "model")
)
_GRANULARITY = replace(_SCOPE, alias="granularity", help=f"{_SCOPE.help}; also granularity")
_ELECT = Parameter("elect", "choice", "sum", "majority sign by weighted sum or by count of signs", constant=True, choices=("sum", "count"))
_ZERO_SIGN = Parameter(
    "zero_sign",
    "choice",
    "positive",
    "sign where the vote is exactly zero: positive (mergekit) or majority of the model (TIES code)",
    constant=True,
    choices=("positive", "majority"),
)
_ON_OVERFLOW = Parameter(
    "on_overflow",
    "choice",
    "density",
    "where gamma and density do not fit: keep density (mergekit) or drop (official code)",
    constant=True,
    choices=("density", "drop"),
)
_OUTLIERS_FIRST = Parameter("outliers_first", "flag", True, "remove the outliers before keeping the top density share", constant=True)
_TALL_LAMBDA = Parameter(
    "tall_mask_lambda", "number", 0.4, "threshold of a model's TALL mask; smaller keeps more", per_model=True, above=0.0
)
_CONSENSUS_K = Parameter("consensus_k", "whole", 2, "fewest models whose masks must agree", constant=True, low=0.0)
_ELECTION = (_ELECT, _ZERO_SIGN)


def _inert(parameter: Parameter) -> Parameter:
    return replace(parameter, inert=True)


def _default(parameter: Parameter, value: Any) -> Parameter:
    return replace(parameter, default=value)


def _delta(*own: Parameter, rescale: Parameter = _RESCALE, normalize: bool = False) -> tuple[Parameter, ...]:
    """The parameters that every delta method of mergekit has, and a method's own ones after ``weight``."""
    return (_WEIGHT, *own, _default(_NORMALIZE, normalize), rescale, _LAMBDA, _INT8_MASK)


_MATCH_L1 = _default(_RESCALE, "l1")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "linear",
            "Linear (model soup)",
            "https://arxiv.org/abs/2203.05482",
            (_WEIGHT, _default(_NORMALIZE, True)),
            base="member",
        ),
        Method(
            "slerp",
            "Spherical interpolation",
            "https://en.wikipedia.org/wiki/Slerp",
            (Parameter("t", "number", REQUIRED, "position between base_model (0) and the other model (1)"),),
            interpolation="slerp",
            max_models=1,
        ),
        Method(
            "task_arithmetic",
            "Task arithmetic",
            "https://arxiv.org/abs/2212.04089",
            _delta(_inert(_DENSITY), rescale=_inert(_RESCALE)),
        ),
        Method(
            "ties",
            "TIES",
            "https://arxiv.org/abs/2306.01708",
            _delta(_DENSITY, _SCOPE, *_ELECTION, normalize=True),
            select="magnitude",
            elected=True,
        ),
        Method("dare_linear", "DARE", "https://arxiv.org/abs/2311.03099", _delta(_DENSITY, rescale=_MATCH_L1), select="dropout"),
        Method(
            "dare_ties",
            "DARE with TIES sign election",
            "https://arxiv.org/abs/2311.03099",
            _delta(_DENSITY, *_ELECTION, rescale=_MATCH_L1),
            select="dropout",
            elected=True,
        ),
        Method(
            "della",
            "DELLA",
            "https://arxiv.org/abs/2406.11617",
            _delta(_DENSITY, _EPSILON, *_ELECTION, rescale=_MATCH_L1, normalize=True),
            select="rank_dropout",
            elected=True,
        ),
        Method(
            "della_linear",
            "DELLA without sign election",
            "https://arxiv.org/abs/2406.11617",
            _delta(_DENSITY, _EPSILON, rescale=_MATCH_L1),
            select="rank_dropout",
        ),
        Method(
            "breadcrumbs",
            "Model Breadcrumbs",
            "https://arxiv.org/abs/2312.06795",
            _delta(_DENSITY, _GAMMA, _GRANULARITY, _ON_OVERFLOW, _OUTLIERS_FIRST),
            select="magnitude",
            band=True,
        ),
        Method(
            "breadcrumbs_ties",
            "Model Breadcrumbs with TIES sign election",
            "https://arxiv.org/abs/2312.06795",
            _delta(_DENSITY, _GAMMA, _GRANULARITY, _ON_OVERFLOW, _OUTLIERS_FIRST, *_ELECTION),
            select="magnitude",
            band=True,
            elected=True,
        ),
        Method(
            "passthrough",
            "Copy of one model",
            "this library",
            (Parameter("scale", "number", None, "factor of the values; null copies them", per_model=True),),
            base="none",
            max_models=1,
        ),
        Method(
            "magnitude",
            "Magnitude-pruned task vectors",
            "this library",
            _delta(_DENSITY, _SCOPE),
            select="magnitude",
        ),
        Method(
            "consensus_ta",
            "Consensus task arithmetic (TALL masks)",
            "https://arxiv.org/abs/2405.07813",
            (_default(_WEIGHT, 1.0), _TALL_LAMBDA, _CONSENSUS_K, _LAMBDA),
            vote="tall",
        ),
        Method(
            "consensus_ties",
            "Consensus TIES (TALL masks)",
            "https://arxiv.org/abs/2405.07813",
            (
                _default(_WEIGHT, 1.0),
                _default(_DENSITY, 0.2),
                _TALL_LAMBDA,
                _CONSENSUS_K,
                _default(_SCOPE, "model"),
                _ELECT,
                _default(_ZERO_SIGN, "majority"),
                _LAMBDA,
            ),
            select="magnitude",
            elected=True,
            vote="tall",
        ),
    )
}

# Not a merge: taskloom compress reads it (docs/compress.md).
TALL_MASKS = Method(
    "tall_masks",
    "TALL-mask compression",
    "https://arxiv.org/abs/2405.07813",
    (
        replace(_default(_WEIGHT, 1.0), constant=True, help="must be 1: any other factor would restore another model than the task's"),
        replace(_TALL_LAMBDA, constant=True),
        Parameter(
            "vector",
            "choice",
            "sum",
            "the tasks' shared vector: sum of the deltas, or ties (trim over the whole model, elect signs, sum)",
            constant=True,
            choices=("sum", "ties"),
        ),
        replace(
            _default(_DENSITY, 0.2),
            constant=True,
            low=None,
            above=0.0,
            help="with vector: ties, share of a delta's entries that the trim keeps",
        ),
    ),
)

ELECT_STAGE: dict[str, Elect] = {"sum": "sign_sum", "count": "sign_count"}

# mergekit 0.1.5 has these; a recipe that asks for one gets a message of its own rather than a near miss.
MERGEKIT_ONLY = ("nuslerp", "multislerp", "karcher", "sce", "model_stock", "nearswap", "arcee_fusion", "ram", "ramplus_tl")
