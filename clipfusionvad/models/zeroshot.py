"""Zero-shot CLIP: the similarity of each snippet with texts, without training.

Nobody released code for it. Source: the baselines of AnomalyCLIP (class names in a template) and LAVAD (two
sentences). B videos, T snippets, D feature width, C classes (0 is *normal*), M normal and K anomalous sentences.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.data.sampling import SegmentSampling
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option
from clipfusionvad.models.base import EmbedDim, Probabilities, TextMethod, VADOutput, VisualWidth, register_method
from clipfusionvad.models.clip import ClipWeights
from clipfusionvad.models.layers.text import ClipTextTower, FixedPrompts

TEMPLATE = "a video from a CCTV camera of a {}"
REDUCTIONS = ("mean", "max", "lme")


@register_method
class ZeroShot(TextMethod):
    """1 − P(normal) of a softmax over class texts, or of normal against anomalous sentences."""

    name = "zeroshot"
    branches = 1
    trained = False

    temperature: Tensor

    def __init__(
        self,
        class_prompts: list[str],
        clip: ClipWeights | None,
        *,
        embed_dim: EmbedDim = 512,
        visual_width: VisualWidth = 512,
        templates: Annotated[
            tuple[str, ...],
            Option("templates of the class texts, whose features are averaged; {}: the name alone", nonempty=True),
        ] = (TEMPLATE,),
        normal_texts: Annotated[
            tuple[str, ...] | None, Option("sentences for what is normal, in place of class texts", nonempty=True)
        ] = None,
        anomalous_texts: Annotated[
            tuple[str, ...] | None, Option("sentences for what is anomalous, in place of class texts", nonempty=True)
        ] = None,
        reduce: Annotated[
            str,
            Option("of several sentences: mean feature, largest similarity, or log of mean exp", choices=REDUCTIONS),
        ] = "mean",
        temperature: Annotated[float, Option("temperature of the softmax; 0.01 is CLIP's own", minimum=1e-6)] = 0.01,
    ):
        super().__init__()
        if (normal_texts is None) != (anomalous_texts is None):
            raise UserError("--normal-texts and --anomalous-texts belong together: give both, or neither")
        self.visual_length, self.visual_width, self.reduce = self.sampling.length, visual_width, reduce
        # In the checkpoint: what a test needs beside the texts.
        self.register_buffer("temperature", torch.tensor(temperature))
        sentences = [*(normal_texts or ()), *(anomalous_texts or ())]
        self.split, self.sentences = len(normal_texts or ()) or None, len(sentences)
        if clip is None:
            return
        if clip.embed_dim != visual_width:
            raise UserError(f"--visual-width {visual_width}, but CLIP {clip.source} embeds into {clip.embed_dim} dims")
        self.clipmodel = ClipTextTower(clip)
        texts = [(sentences, "{}")] if sentences else [(class_prompts, template) for template in templates]
        self.prompts = nn.ModuleList(FixedPrompts(*group) for group in texts)

    @classmethod
    def sampling_of(cls, options: Mapping[str, Any]) -> SegmentSampling:
        return SegmentSampling(256)

    @property
    def text_count(self) -> int:
        return self.sentences or super().text_count

    def encode_text(self) -> Tensor:
        """Return the text features of norm 1: (C, D), or (M + K, D) of the sentences."""
        features = [F.normalize(prompts(self.clipmodel), dim=-1) for prompts in self.prompts]
        return F.normalize(torch.stack(features).mean(dim=0), dim=-1)

    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> VADOutput:
        """The fine logits are None where sentences replace the classes."""
        self.check_visual(visual, any_length=True)
        text = self.encode_once() if text is None else text
        if self.split is not None and self.reduce == "mean":
            halves = (text[: self.split], text[self.split :])
            text = F.normalize(torch.stack([half.mean(dim=0) for half in halves]), dim=-1)
        # A row of zeros has the similarity 0 with every text.
        logits = F.normalize(visual.float(), dim=-1) @ text.float().T / self.temperature
        if self.split is None:
            return VADOutput((logits[..., 1:].logsumexp(dim=-1) - logits[..., 0])[..., None], logits, text)
        at = 1 if self.reduce == "mean" else self.split
        normal, anomalous = logits[..., :at], logits[..., at:]
        return VADOutput((self._reduce(anomalous) - self._reduce(normal))[..., None], None, text)

    def _reduce(self, logits: Tensor) -> Tensor:
        if self.reduce == "lme":
            return logits.logsumexp(dim=-1) - math.log(logits.shape[-1])
        return logits.amax(dim=-1)

    def scores(self, output: VADOutput) -> Probabilities:
        """The sigmoid of the coarse logits is 1 − P(normal), summed over the other classes: exact near 1 as well."""
        classes = None if output.fine_logits is None else output.fine_logits.softmax(dim=-1)
        return Probabilities((torch.sigmoid(output.coarse_logits).squeeze(-1),), classes)

    def losses(self, output: VADOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        raise UserError(f"{self.name} has nothing to train")
