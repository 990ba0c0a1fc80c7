"""The methods of the library: facts that ``taskloom methods`` lists. Needs no torch; a method's code is imported when it is used."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from taskloom.methods.claim import Claim

Family = Literal["masked", "lowrank", "routed", "gating"]

RESULT_NAME = "result.json"


class MethodError(Exception):
    """A method that is unknown, or that cannot run as asked; the message says what was expected."""


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes
    ----------
    name
        What it is called here; its code is the package ``taskloom.methods.WING.NAME``.
    wing
        The folder of related methods.
    title, paper
        What it is, and where it was published: title, year, arXiv number.
    family
        The family of kernels it is built on.
    claim
        The paper's central claim, in a sentence.
    needs
        Packages beyond the library's own that its experiment imports, by module, and the package that brings each.
    """

    name: str
    wing: str
    title: str
    paper: str
    family: Family
    claim: str
    needs: tuple[tuple[str, str], ...] = ()

    @property
    def package(self) -> str:
        """The package that holds its code."""
        return f"taskloom.methods.{self.wing}.{self.name}"

    def claims(self) -> tuple[Claim, ...]:
        """Its experiments; this imports torch."""
        claims: tuple[Claim, ...] = importlib.import_module(f"{self.package}.claim").CLAIMS
        return claims

    def shipped_result(self) -> Traversable:
        """The result of the full run that came with this version of the library; it need not exist."""
        return files("taskloom").joinpath("methods", self.wing, self.name, RESULT_NAME)


METHODS: dict[str, Method] = {}


def _add(method: Method) -> None:
    METHODS[method.name] = method


_add(
    Method(
        name="atlas",
        wing="merging",
        title="Anisotropic scaling of task vectors (aTLAS)",
        paper="Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, NeurIPS 2024, arXiv 2407.02880",
        family="masked",
        claim="A learned coefficient for each task vector and parameter block composes vectors better than one for each vector.",
        needs=(("sklearn", "scikit-learn"),),
    )
)

_add(
    Method(
        name="breadcrumbs",
        wing="merging",
        title="Model Breadcrumbs",
        paper="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, 2023, arXiv 2312.06795",
        family="masked",
        claim="Task vectors without their largest and small entries merge better; settings found on few tasks serve for more.",
        needs=(("sklearn", "scikit-learn"),),
    )
)

_add(
    Method(
        name="controllable_mtl",
        wing="channels",
        title="Controllable multi-task networks (ECMT)",
        paper="Efficient Controllable Multi-Task Architectures, ICCV 2023, arXiv 2308.11744",
        family="routed",
        claim="Channel widths of one network's encoder and decoders trade computation and tasks against each other after training.",
        needs=(("sklearn", "scikit-learn"),),
    )
)

_add(
    Method(
        name="dtr",
        wing="channels",
        title="Denoising task routing (DTR)",
        paper="Denoising Task Routing for Diffusion Models, 2024, arXiv 2310.07138",
        family="routed",
        claim="Diffusion models do better when each timestep sees a window of the channels that slides with it; random channels do harm.",
        needs=(("sklearn", "scikit-learn"),),
    )
)

_add(
    Method(
        name="home",
        wing="routing",
        title="Hierarchy of multi-gate experts (HoME)",
        paper="HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou, 2024, arXiv 2408.05430",
        family="gating",
        claim="Normalised experts in a hierarchy of categories rank better than a flat pool of ReLU experts, rare tasks most.",
    )
)

_add(
    Method(
        name="rmm",
        wing="merging",
        title="Reversible model merging (RMM)",
        paper="Towards Reversible Model Merging For Low-rank Weights, 2025, arXiv 2510.14163",
        family="lowrank",
        claim="Low-rank adapters stored in shared bases come back nearly as good as they were, where merged factors are lost.",
        needs=(("sklearn", "scikit-learn"),),
    )
)

_add(
    Method(
        name="roma",
        wing="routing",
        title="Routing manifold alignment (RoMA)",
        paper="Routing Manifold Alignment Improves Generalization of Mixture-of-Experts LLMs, 2025, arXiv 2511.07419",
        family="gating",
        claim="Routers tuned towards the routing of correctly answered neighbours generalise better than routers tuned on the task alone.",
    )
)

_add(
    Method(
        name="snella",
        wing="sparsity",
        title="Kernelized sparse fine-tuning (SNELL, SNELLA)",
        paper="Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models, 2025, arXiv 2510.24037",
        family="lowrank",
        claim="Kernels of thin factors fit what no product of their rank can; layers that compete for non-zero entries do better.",
    )
)

_add(
    Method(
        name="tall_masks",
        wing="merging",
        title="TALL masks and consensus merging",
        paper="Localizing Task Information for Improved Model Merging and Compression, ICML 2024, arXiv 2405.07813",
        family="masked",
        claim="Fine-tunings come back from one shared vector and a bit per parameter each; what fewer than two tasks need harms a merge.",
        needs=(("sklearn", "scikit-learn"),),
    )
)


_add(
    Method(
        name="tangent_arithmetic",
        wing="merging",
        title="Task arithmetic in the tangent space",
        paper="Task Arithmetic in the Tangent Space: Improved Editing of Pre-Trained Models, NeurIPS 2023, arXiv 2305.12827",
        family="masked",
        claim="Task vectors of a model fine-tuned in its tangent space add up and subtract with less harm to each other's tasks.",
        needs=(("sklearn", "scikit-learn"),),
    )
)


def find_method(name: str) -> Method:
    """The method of a name.

    Raises
    ------
    MethodError
        If there is none; the message names the nearest.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name.lower().replace("-", "_"), METHODS, n=1)
        known = f"did you mean {close[0]!r}?" if close else f"the methods are {', '.join(sorted(METHODS))}"
        raise MethodError(f"there is no method {name!r}; {known}")
    return METHODS[name]
