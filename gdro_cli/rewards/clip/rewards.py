"""The rewards of CLIP networks.

Importing this module loads no network library: recipes are checked against the classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from gdro_cli.config.base import Affects, StrictModel
from gdro_cli.rewards.clip.batched import BatchedReward

if TYPE_CHECKING:
    from PIL import Image

    from gdro_cli.rewards.clip.aesthetic import AestheticHead
    from gdro_cli.rewards.clip.network import ClipNetwork

ModelName = Annotated[str, Field(min_length=1), Affects("speed")]
"""The version has the Hub id and commit, or the digest of the files, wherever they are."""


class ClipSettings(StrictModel):
    """Settings of the CLIP reward."""

    model: ModelName = "openai/clip-vit-large-patch14"
    """A CLIP of transformers: its folder, or its Hub id."""


class PickScoreSettings(StrictModel):
    """Settings of PickScore."""

    model: ModelName = "yuvalkirstain/PickScore_v1"
    """PickScore: its folder, or its Hub id."""
    processor: ModelName = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """The CLIP that PickScore was made from, for its image processor and tokenizer: its folder, or its Hub id."""


class HpsSettings(StrictModel):
    """Settings of HPSv2."""

    model: ModelName = "RE-N-Y/hpsv21"
    """HPSv2 or HPSv2.1 as safetensors with OpenCLIP's names, or as a CLIP of transformers: its folder, or its Hub
    id."""
    base: ModelName = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """The CLIP that HPSv2 was made from, for its configuration and tokenizer: its folder, or its Hub id."""


class AestheticSettings(StrictModel):
    """Settings of the aesthetic reward."""

    model: ModelName = "openai/clip-vit-large-patch14"
    """The CLIP ViT-L/14 that the head was trained on: its folder, or its Hub id."""
    head: ModelName = "RE-N-Y/laion-aesthetic"
    """The head's weights as safetensors: their folder, or their Hub id."""


class _Similarity(BatchedReward):
    """The cosine of the directions of image and prompt, times a factor."""

    rule: ClassVar[str]
    """Name of the rule in the provenance; it changes whenever equal networks would give other numbers."""
    network: ClipNetwork
    """Finding it raises ``PrerequisiteError`` and ``UserError``."""

    @property
    @abstractmethod
    def factor(self) -> float:
        """Of the cosine."""

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the rule and the network's files."""
        return {"reward": self.name, "rule": self.rule, **self.network.version}

    def load(self) -> None:
        """Load the network; a second call does nothing. Raises ``PrerequisiteError``."""
        self.network.load()

    def values(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """The cosines times the factor."""
        cosines = (self.network.embed_images(images) * self.network.embed_texts(texts)).sum(dim=-1)
        return [self.factor * cosine for cosine in cosines.tolist()]


class ClipReward(_Similarity):
    """The similarity of image and prompt: 100 times the cosine, as CLIPScore is usually reported (arXiv 2104.08718).

    Without CLIPScore's cut at 0, its factor 2.5 and its words before the prompt.
    """

    name = "clip"
    purpose = "to draw what a prompt says, by CLIP"
    Settings = ClipSettings
    scale = (-100.0, 100.0)
    rule = "cosine-1"
    factor = 100.0
    settings: ClipSettings

    @cached_property
    def network(self) -> ClipNetwork:  # type: ignore[override]
        """Raises ``PrerequisiteError`` and ``UserError``."""
        from gdro_cli.rewards.clip.network import ClipNetwork

        return ClipNetwork(self.settings.model, key="reward.clip.model")


class PickScoreReward(_Similarity):
    """PickScore: which of two images people prefer for a prompt (arXiv 2305.01569); about 17 to 24.

    The cosine times the network's ``exp(logit_scale)``, about 100. Flow-GRPO's code divides it by 26.
    """

    name = "pickscore"
    purpose = "to draw what people prefer, by PickScore"
    Settings = PickScoreSettings
    scale = (-100.0, 100.0)
    rule = "pickscore-1"
    settings: PickScoreSettings

    @cached_property
    def network(self) -> ClipNetwork:  # type: ignore[override]
        """Raises ``PrerequisiteError`` and ``UserError``."""
        from gdro_cli.rewards.clip.network import ClipNetwork

        processor = self.settings.processor, "reward.pickscore.processor"
        return ClipNetwork(self.settings.model, key="reward.pickscore.model", processor=processor)

    @property
    def factor(self) -> float:
        """``exp(logit_scale)``."""
        return self.network.logit_scale


class HpsReward(_Similarity):
    """HPSv2: which of two images people prefer for a prompt (arXiv 2306.09341); a cosine, about 0.2 to 0.35."""

    name = "hpsv2"
    purpose = "to draw what people prefer, by HPSv2"
    Settings = HpsSettings
    scale = (-1.0, 1.0)
    rule = "hpsv2-1"
    factor = 1.0
    settings: HpsSettings

    @cached_property
    def network(self) -> ClipNetwork:  # type: ignore[override]
        """Raises ``PrerequisiteError`` and ``UserError``."""
        from gdro_cli.rewards.clip.hps import HpsNetwork

        return HpsNetwork(self.settings.model, base=self.settings.base)


class AestheticReward(BatchedReward):
    """LAION's aesthetic predictor: how pleasing an image is, whatever its prompt; about 1 to 10.

    The linear head ``sac+logos+ava1-l14-linearMSE`` on directions of CLIP ViT-L/14.
    """

    name = "aesthetic"
    purpose = "to draw pleasing images, by LAION's aesthetic predictor"
    Settings = AestheticSettings
    scale = (-math.inf, math.inf)
    settings: AestheticSettings

    @cached_property
    def network(self) -> ClipNetwork:
        """Raises ``PrerequisiteError`` and ``UserError``."""
        from gdro_cli.rewards.clip.network import ClipNetwork

        return ClipNetwork(self.settings.model, key="reward.aesthetic.model")

    @cached_property
    def head(self) -> AestheticHead:
        """Raises ``PrerequisiteError``."""
        from gdro_cli.rewards.clip.aesthetic import AestheticHead

        return AestheticHead(self.settings.head)

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the rule and the files of network and head."""
        return {"reward": self.name, "rule": "laion-linear-1", **self.network.version, "head": self.head.version}

    def load(self) -> None:
        """Load network and head; a second call does nothing. Raises ``PrerequisiteError``."""
        self.network.load()
        self.head.load(width=self.network.width)

    def values(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """The head's numbers; the texts do not count."""
        return self.head(self.network.embed_images(images))
