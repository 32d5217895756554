"""AnomalyCLIP (CVIU 2024, arXiv 2310.02835): CLIP's space centred on normal videos, in which a class is a direction.

B videos, S segments of F frames (T = S·F), D feature width, C classes of which 0 is *normal*, K segments chosen.
Formulas and parameter names are those of the released code.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfusionvad.data.sampling import GridSampling
from clipfusionvad.io.errors import UserError
from clipfusionvad.io.option import Option, layers, non_negative, size
from clipfusionvad.losses import class_shares, segment_losses
from clipfusionvad.models import register_method
from clipfusionvad.models.base import EmbedDim, Probabilities, TextMethod, VADOutput, VisualWidth, isolated_rng
from clipfusionvad.models.clip import CONTEXT_LENGTH, ClipWeights, tokenize
from clipfusionvad.models.layers.temporal import TEMPORAL_MODELS, TemporalModel
from clipfusionvad.models.layers.text import ClipTextTower, FixedPrompts, PromptLayout, PromptTemplate

CONTEXT_STD = 0.02
# Score of a dropped segment: it is chosen only where fewer than K others are left.
DROPPED = 1e6
PROMPTS, SELECTIONS = ("learned", "fixed", "direct"), ("similarity", "magnitude")
CLIP_PREFIX = "clipmodel."
# Prefixes of CLIP's weights in released files, and OpenAI's; the first that fits counts.
CLIP_PARTS = [("image_encoder.", "visual."), ("token_embedding.", "token_embedding.")]
CLIP_PARTS += [("selector_model.logit_scale", "logit_scale"), ("text_encoder.", "")]
PROJECTION = "text_encoder.text_projection"
TOKEN_PREFIX, TOKEN_SUFFIX = "prompt_learner.token_prefix", "prompt_learner.token_suffix"


def _dropout(kind: str) -> Option:
    return Option(f"share of segments that are dropped before the {kind} selection", minimum=0, below=1)


def _weight(meaning: str) -> Option:
    return non_negative(f"weight of: {meaning}; 0: without")


@dataclass(frozen=True, kw_only=True)
class SegmentOutput(VADOutput):
    """``fine_logits`` are log p(normal) and log p(abnormal, class), so that their exponentials sum to one."""

    similarity: Tensor  # (B, T, C−1), with the anomalous classes
    magnitudes: Tensor | None = None  # (B, T), norms of the centred frames, where segments are selected by them


@register_method
class AnomalyCLIP(TextMethod):
    """A selector of class directions around the normal mean, and an axial transformer that scores each frame.

    Parameters with a row or column per class keep the released alphabetical order, unlike inputs and outputs.
    """

    name = "anomalyclip"
    branches = 1
    single_label = True
    centroid_buffers = ("ncentroid",)

    rank: Tensor
    anomalies: Tensor
    columns: Tensor
    ncentroid: Tensor

    def __init__(
        self,
        class_prompts: Sequence[str],
        clip: ClipWeights | None,
        *,
        embed_dim: EmbedDim = 512,
        visual_width: VisualWidth = 512,
        num_segments: Annotated[int, size("segments that a model input takes from a video")] = 32,
        seg_length: Annotated[int, size("consecutive frames of a segment")] = 16,
        prompts: Annotated[
            str, Option("learned context before the class name, a template, or learned directions", choices=PROMPTS)
        ] = "learned",
        prompt_template: PromptTemplate = "{}",
        n_ctx: Annotated[int, size("learned tokens before the class name")] = 8,
        ctx_init: Annotated[str, Option("words, joined by _, as which learned tokens start; they set --n-ctx")] = "",
        shared_context: Annotated[bool, Option("one learned context for all classes")] = False,
        learn_projection: Annotated[bool, Option("fine-tune CLIP's text projection")] = True,
        recentre: Annotated[bool, Option("centre on the mean normal feature; else plain cosine similarity")] = True,
        temporal: Annotated[
            str, Option("attention along both axes of the grid, one axis, all frames, or none", choices=TEMPORAL_MODELS)
        ] = "axial",
        emb_size: Annotated[int, size("width of the temporal model")] = 256,
        depth: Annotated[int, layers("units of the transformer")] = 1,
        heads: Annotated[int, size("attention heads of the transformer")] = 8,
        dim_heads: Annotated[int | None, size("width of an attention head (default: --emb-size / --heads)")] = None,
        concat_features: Annotated[bool, Option("the temporal model reads the similarities too")] = False,
        selection: Annotated[str, Option("choose segments by direction or by norm", choices=SELECTIONS)] = "similarity",
        num_topk: Annotated[int, size("segments of a video that are most like its class")] = 3,
        num_bottomk: Annotated[int, size("segments of a video that are least like its class")] = 3,
        select_idx_dropout_topk: Annotated[float, _dropout("topk")] = 0.7,
        select_idx_dropout_bottomk: Annotated[float, _dropout("bottomk")] = 0.7,
        dir_abn_weight: Annotated[float, _weight("top segments lie along their class's direction")] = 1.0,
        dir_nor_weight: Annotated[float, _weight("normal frames lie along no direction")] = 1.0,
        topk_abn_weight: Annotated[float, _weight("class likelihood of the top segments")] = 1.0,
        bottomk_abn_weight: Annotated[float, _weight("normality of the bottom segments of abnormal videos")] = 1.0,
        topk_nor_weight: Annotated[float, _weight("normality of the top segments of normal videos")] = 1.0,
        smooth_weight: Annotated[float, _weight("jumps of the score in abnormal videos")] = 8e-4,
        sparse_weight: Annotated[float, _weight("mean score of abnormal videos")] = 8e-3,
    ):
        super().__init__()
        if dim_heads is None and emb_size % heads:
            fault = f"--emb-size {emb_size} is not a multiple of --heads {heads}"
            raise UserError(f"{fault}: change one, or pass --dim-heads")
        for kind, count in (("topk", num_topk), ("bottomk", num_bottomk)):
            if count > num_segments:
                raise UserError(f"--num-{kind} {count} is more than the --num-segments {num_segments}")
        self.visual_width, self.visual_length = visual_width, num_segments * seg_length
        self.num_segments, self.seg_length = num_segments, seg_length
        self.grid, self.chosen = (num_segments, seg_length), (num_topk, num_bottomk)
        self.dropout = (select_idx_dropout_topk, select_idx_dropout_bottomk)
        self.recentre, self.concat_features, self.selection = recentre, concat_features, selection
        self.weights = {"dir_abn": dir_abn_weight, "dir_nor": dir_nor_weight, "topk_abn": topk_abn_weight}
        self.weights |= {"bottomk_abn": bottomk_abn_weight, "topk_nor": topk_nor_weight}
        self.weights |= {"smooth": smooth_weight, "sparse": sparse_weight}
        if not any(self.weights.values()):
            raise UserError("every loss weight is 0: there is nothing to train on")

        names = [prompt.replace("_", " ") for prompt in class_prompts]
        alphabetical = torch.tensor(sorted(range(len(names)), key=lambda index: names[index].lower()))
        anomalies = alphabetical[alphabetical > 0]
        # The index of each class among the parameters, and of each anomalous class among those of the selector.
        self.register_buffer("rank", alphabetical.argsort(), persistent=False)
        self.register_buffer("anomalies", anomalies, persistent=False)
        self.register_buffer("columns", anomalies.argsort(), persistent=False)
        centroid = torch.full((visual_width,), torch.nan if recentre else 0.0)
        self.register_buffer("ncentroid", centroid, persistent=recentre)
        self.prompt_learner: Any = None
        if clip:
            clip.check_widths(embed_dim, visual_width)
            self.clipmodel = ClipTextTower(clip)
            ordered = [names[index] for index in alphabetical.tolist()]
            with isolated_rng("context"):
                if prompts == "direct":
                    # No text: a direction of each class is learned in CLIP's space, from a random start.
                    vectors = nn.init.normal_(torch.empty(len(ordered), visual_width), std=CONTEXT_STD)
                    self.prompt_learner = nn.ParameterDict({"vectors": vectors})
                elif prompts == "fixed":
                    self.prompt_learner = FixedPrompts(ordered, prompt_template)
                else:
                    self.prompt_learner = ContextPrompts(ordered, self.clipmodel, n_ctx, ctx_init, shared_context)
            projection = nn.Parameter(self.clipmodel.text_projection.detach().clone())
            projection.requires_grad_(learn_projection and prompts != "direct")
            self.text_encoder = nn.ParameterDict({"text_projection": projection})
        self.selector_model = nn.ModuleDict({"bn_layer": nn.BatchNorm1d(len(anomalies), affine=False)})
        width = visual_width + concat_features * len(anomalies)
        sizes: dict[str, Any] = {"emb_size": emb_size, "depth": depth, "heads": heads, "dim_heads": dim_heads}
        self.temporal_model = TemporalModel(width, temporal, self.grid, **sizes)

    @classmethod
    def sampling_of(cls, options: Mapping[str, Any]) -> GridSampling:
        return GridSampling(options["num_segments"], options["seg_length"])

    def set_normal_centroid(self, normal_videos: Iterable[np.ndarray]) -> None:
        """Set the centroid to the mean over all rows of all normal training videos."""
        total, rows = np.zeros(self.visual_width), 0
        for video in normal_videos:
            total += video.sum(axis=0, dtype=np.float64)
            rows += len(video)
        if not rows:
            raise UserError(f"{self.name} centres features on those of normal training videos, but there are none")
        if self.recentre:
            self.ncentroid.copy_(torch.from_numpy(total / rows))

    def encode_text(self) -> Tensor:
        """Return the text features, neither normalised nor centred, (C, E); learned directions are shifted to them."""
        prompts = self.prompt_learner
        if isinstance(prompts, nn.ParameterDict):
            return (prompts["vectors"] + self.ncentroid)[self.rank]
        words = prompts.embed(self.clipmodel)
        return self.clipmodel(words, prompts.layout, self.text_encoder["text_projection"])[self.rank]

    def context_vectors(self) -> Tensor | None:
        """Return the context of each class in the order of ``class_prompts``, or the shared one."""
        ctx = getattr(self.prompt_learner, "ctx", None)
        return ctx if ctx is None or ctx.dim() == 2 else ctx[self.rank]

    def forward(self, visual: Tensor, lengths: Tensor | None = None, text: Tensor | None = None) -> SegmentOutput:
        """visual (B, S·F, D), all of it valid → output. ``UserError`` without a normal centroid."""
        if not self.has_normal_centroid:
            lacking = "the mean feature of the normal training videos (ncentroid), which released files lack"
            hint = "pass the training list, or the videos' features to set_normal_centroid()"
            raise UserError(f"{self.name} needs {lacking}: {hint}")
        self.check_visual(visual)
        text = self.encode_once() if text is None else text
        x = visual - self.ncentroid
        similarity = self.select(x, text)
        coarse = self.temporal_model(torch.cat([similarity, x], dim=-1) if self.concat_features else x, self.grid)
        similarity = similarity[..., self.columns]
        abnormal = F.logsigmoid(coarse.float()) + similarity.float().log_softmax(dim=-1)
        fine = torch.cat([F.logsigmoid(-coarse.float()), abnormal], dim=-1)
        magnitudes = torch.linalg.vector_norm(x, dim=-1) if self.selection == "magnitude" else None
        return SegmentOutput(coarse, fine, text, similarity=similarity, magnitudes=magnitudes)

    def select(self, x: Tensor, text: Tensor) -> Tensor:
        """Project centred frames (B, T, D) on the directions of the classes, in alphabetical order: (B, T, C−1).

        They are normalised over all frames. Without re-centring the projections are cosines.
        """
        directions = F.normalize(text[self.anomalies] - self.ncentroid, dim=-1)
        projected = (x if self.recentre else F.normalize(x, dim=-1)) @ directions.T
        return self.selector_model["bn_layer"](projected.flatten(0, 1)).view(projected.shape)

    def losses(self, output: SegmentOutput, targets: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The weighted terms of ``segment_losses``, without those of weight 0."""
        similarity = output.similarity.float()
        # A normal video counts with the sum over all classes.
        shares = torch.where(targets[:, :1] > 0, 1, class_shares(targets))
        top, bottom = self.choose_segments(similarity, shares, output.magnitudes)
        scores = torch.sigmoid(output.coarse_logits.float()).squeeze(-1)
        similarity, fine, scores = (x.unflatten(1, self.grid) for x in (similarity, output.fine_logits, scores))
        terms = segment_losses(similarity, fine, scores, targets, top, bottom)
        return {name: weight * terms[name] for name, weight in self.weights.items() if weight}

    @torch.no_grad()
    def choose_segments(self, similarity: Tensor, shares: Tensor, magnitudes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the segments of each video with the highest and the lowest score, (B, K) each.

        By the sum of the similarity (B, T, C−1) weighted by ``shares`` (B, C−1), or by ``magnitudes`` (B, T).
        """
        if magnitudes is None:
            scores = (similarity.unflatten(1, self.grid).sum(dim=2) * shares[:, None]).sum(dim=-1)
        else:
            scores = magnitudes.float().unflatten(1, self.grid).sum(dim=2)
        high = low = scores
        if self.training:
            masks = segment_masks(scores.shape, *self.dropout)
            kept_high, kept_low = (mask.to(scores.device, non_blocking=True) for mask in masks)
            high, low = scores.where(kept_high, -DROPPED), scores.where(kept_low, DROPPED)
        top, bottom = self.chosen
        return high.topk(top, dim=1).indices, low.topk(bottom, dim=1, largest=False).indices

    def scores(self, output: VADOutput) -> Probabilities:
        return Probabilities((torch.sigmoid(output.coarse_logits.float()).squeeze(-1),), output.fine_logits.exp())

    @classmethod
    def matches_state_dict(cls, state: Mapping[str, Tensor]) -> bool:
        return "selector_model.bn_layer.running_mean" in state

    @classmethod
    def from_released(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a released state dict under our names, without its tokens, which follow from the class names."""
        clip = {CLIP_PREFIX + name: value for key, value in state.items() if (name := _rename(key, CLIP_PARTS))}
        own = {key: value for key, value in state.items() if key == PROJECTION or not _rename(key, CLIP_PARTS)}
        return clip | {key: value for key, value in own.items() if key not in (TOKEN_PREFIX, TOKEN_SUFFIX)}

    def to_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the released form, in float32 as the released code runs; it does not contain the normal centroid."""
        if not (self.recentre and self.temporal_model.axial_attn and isinstance(self.prompt_learner, ContextPrompts)):
            raise UserError(f"the released code of {self.name} has none of the ablations, so it cannot load this model")
        inside = {key.removeprefix(CLIP_PREFIX): value for key, value in state.items() if key.startswith(CLIP_PREFIX)}
        if "visual.proj" not in inside:
            raise UserError(f"released files of {self.name} hold a CLIP with a vision transformer: pass it with --clip")
        back = [(ours, theirs) for theirs, ours in CLIP_PARTS]
        clip = {name: value.float() for key, value in inside.items() if (name := _rename(key, back))}
        own = {key: value for key, value in state.items() if key != "ncentroid" and not key.startswith(CLIP_PREFIX)}
        tokens, length = self.prompt_learner.tokens, self.prompt_learner.ctx.shape[-2]
        words = clip["token_embedding.weight"]
        words = words[F.pad(tokens, (0, CONTEXT_LENGTH - tokens.shape[1])).to(words.device)]
        return clip | own | {TOKEN_PREFIX: words[:, :1].contiguous(), TOKEN_SUFFIX: words[:, 1 + length :].contiguous()}


def segment_masks(shape: Sequence[int], rate_top: float, rate_bottom: float) -> tuple[Tensor, Tensor]:
    """Draw which segments of each video, (B, S) bool, the top and the bottom selection may choose.

    At equal rates both use the second draw (released code). Drawn on the CPU, whose state a resumed run restores.
    """
    top, bottom = (torch.bernoulli(torch.full(tuple(shape), 1 - rate)).bool() for rate in (rate_top, rate_bottom))
    return (bottom if rate_top == rate_bottom else top), bottom


def _rename(key: str, prefixes: Iterable[tuple[str, str]]) -> str | None:
    """Return the key with its first matching prefix replaced, or None."""
    return next((new + key.removeprefix(old) for old, new in prefixes if key.startswith(old)), None)


class ContextPrompts(FixedPrompts):
    """``[SOT | context | name . EOT]`` of each class; the context is the parameter ``ctx``.

    ``ctx`` is (C, n, W), or (n, W) where all classes share it. With ``ctx_init``, words joined by "_" or " ", learning
    starts at their n embeddings. Source: CoOp, as AnomalyCLIP uses it.
    """

    def __init__(self, class_names: list[str], tower: ClipTextTower, n_ctx: int, ctx_init: str, shared: bool):
        words = ctx_init.replace("_", " ").strip()
        tokens = tokenize([words])[0]
        n_ctx = int(tokens.argmax()) - 1 if words else n_ctx
        super().__init__(class_names, f"{words or ' '.join(['X'] * n_ctx)} {{}}.")
        ctx = torch.empty(n_ctx, tower.token_embedding.embedding_dim)
        if words:
            ctx.copy_(tower.token_embedding.weight[tokens[1 : n_ctx + 1]])
        if not shared:
            ctx = ctx.repeat(len(class_names), 1, 1)
            self.layout = PromptLayout(self.layout.ends, shared=1)
        self.ctx = nn.Parameter(ctx if words else nn.init.normal_(ctx, std=CONTEXT_STD))

    def embed(self, tower: ClipTextTower, context: Tensor | None = None) -> Tensor:
        words = super().embed(tower)
        return torch.cat([words[:, :1], self.ctx.expand(len(words), -1, -1), words[:, 1 + self.ctx.shape[-2] :]], dim=1)
