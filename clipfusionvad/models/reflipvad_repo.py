"""What the released code of ReFLIP-VAD (TCSVT 2024) was written to compute: VadCLIP with prompts shifted by DistilBERT.

That code does not run, and the authors published no weights, so no outputs can be compared. C classes.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor, nn

from clipfusionvad.io.option import Option
from clipfusionvad.models.base import isolated_rng, register_method
from clipfusionvad.models.clip import ClipWeights
from clipfusionvad.models.layers.distilbert import DistilBert, DistilBertName
from clipfusionvad.models.layers.dual_branch import DualBranch
from clipfusionvad.models.layers.text import PromptLayout


@register_method
class ReFLIPVADRepo(DualBranch):
    """VadCLIP whose class prompts are shifted by the mean DistilBERT state of the class label.

    DistilBERT is trained, and without a mask [PAD] counts too. Ours is a linear layer where its width is not CLIP's.
    """

    name = "reflipvad_repo"

    def __init__(
        self,
        class_prompts: list[str],
        clip: ClipWeights | None,
        *,
        prompt_encoder: DistilBertName = None,
        residual: Annotated[bool, Option("add a label's mean DistilBERT state to its prompt embeddings")] = True,
        **shared: Any,
    ):
        super().__init__(class_prompts, clip, **shared)
        self.residual = residual
        if clip is None:
            return
        if residual:
            # The shift of a class reaches its very first token, so that no token is shared.
            self.prompts.layout = PromptLayout(self.prompts.layout.ends)
        distilbert = DistilBert.find(prompt_encoder, clip)
        with isolated_rng("distilbert"):
            self.distilbert_model = distilbert.build()
            own, wanted = self.distilbert_model.config.dim, clip.text_width
            self.distilbert_projection = nn.Linear(own, wanted) if own != wanted else nn.Identity()
        self.register_buffer("label_ids", distilbert.tokens(class_prompts), persistent=False)

    def encode_labels(self) -> Tensor:
        """Return the mean of DistilBERT's last states over all positions of each label, (C, its width)."""
        return self.distilbert_model(self.label_ids).last_hidden_state.mean(dim=1)

    def encode_text(self) -> Tensor:
        if not self.residual:
            return super().encode_text()
        words = self.prompts.embed(self.clipmodel, self.context_table)
        shift = self.distilbert_projection(self.encode_labels())
        return self.clipmodel(words + shift[:, None], self.prompts.layout)

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return "gc1.weight" in state and any(key.startswith("distilbert_model.") for key in state)

    @classmethod
    def from_released(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Older versions of transformers wrote an entry that is not a weight.
        weights = {key: value for key, value in state.items() if key != "distilbert_model.embeddings.position_ids"}
        return {re.sub(r"^ReFLIPmodel\.", "clipmodel.", key): value for key, value in weights.items()}

    def to_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {re.sub(r"^clipmodel\.", "ReFLIPmodel.", key): value for key, value in state.items()}
