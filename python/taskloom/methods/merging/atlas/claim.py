"""The claims on projected digits."""

from __future__ import annotations

from taskloom.methods.merging.atlas.claim_adaptation import ADAPTATION
from taskloom.methods.merging.atlas.claim_addition import ADDITION
from taskloom.methods.merging.atlas.claim_lowrank import LOW_RANK
from taskloom.methods.merging.atlas.claim_mixing import MIXING
from taskloom.methods.merging.atlas.claim_negation import NEGATION
from taskloom.methods.merging.atlas.claim_shots import PARTITIONS

CLAIMS = (ADDITION, LOW_RANK, MIXING, PARTITIONS, NEGATION, ADAPTATION)
