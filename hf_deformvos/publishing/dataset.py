"""A data set of parquet shards to the Hub: its card, and one commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import DatasetCardData

from . import cards
from .hub import CARD, Published, Target, Upload, publish_files


_SHARD = re.compile(r"data/(\w+)-\d{5}-of-\d{5}\.parquet")
_SIZES = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M"}


def render_dataset_card(
    title: str,
    facts: Mapping,
    name: str,
    license: str | None = None,
    license_note: str | None = None,
) -> str:
    """
    The card of a data set of video object segmentation.

    Args:
        title (`str`): What it is called.
        facts (`Mapping`): What was written: `splits` (by name, with `sequences`, `frames`, `masks`, `objects`,
            `shards`, `size`), `one_object`, `reencoded` and `short_side`.
        name (`str`): The Hub repository or the folder that the examples load.
        license (`str`, *optional*): One of the Hub's names of licences, such as `cc-by-nc-4.0`.
        license_note (`str`, *optional*): The terms in words.

    Returns:
        `str`: The text, sealed.
    """
    splits = facts["splits"]
    num_frames = sum(counts["frames"] for counts in splits.values())
    metadata = DatasetCardData(
        # Terms in words alone are none that the Hub has a name for.
        license=license or ("other" if license_note else "unknown"),
        task_categories=["mask-generation", "image-segmentation"],
        tags=["video-object-segmentation", "video", "deformvos"],
        size_categories=next((text for limit, text in _SIZES.items() if num_frames < limit), "n>1M"),
        pretty_name=title,
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*"} for split in splits],
            }
        ],
    )
    template = cards.template_environment().get_template("dataset_card.md.jinja")
    text = template.render(
        metadata=metadata.to_yaml(line_break="\n").strip(),
        title=title,
        name=name,
        splits=splits,
        facts=facts,
        has_gaps=any(counts["masks"] < counts["frames"] for counts in splits.values()),
        license=license,
        license_note=license_note,
        evaluated="val" if "val" in splits else next(iter(splits)),
        trained="train" if "train" in splits else None,
    )
    return cards.seal(re.sub(r"\n{3,}", "\n\n", text))


def publish_dataset(
    folder: str | Path,
    target: Target,
    description: str = "",
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Published:
    """
    Publish a folder of `README.md` and `data/<split>-00000-of-00001.parquet`, in one commit.

    Args:
        folder (`str` or `Path`): What to publish; whatever else is in it stays behind.
        target ([`hub.Target`]): The repository, of the type `"dataset"`.
        description (`str`, *optional*): The commit's text.
        token (`str`, *optional*): by default the one that is logged in.
        force (`bool`, defaults to `False`): overwrite a card that was edited on the Hub, and remove splits that the
            folder does not have.
        dry_run (`bool`, defaults to `False`): do all but commit.

    Returns:
        [`hub.Published`]: what was done, or would be.

    Raises:
        ValueError: if the repository has splits that the folder has not.
        hub.PublishError: if the Hub refuses or cannot be reached; see [`hub.publish_files`].
    """
    folder = Path(folder)
    names = [CARD, *(f"data/{path.name}" for path in sorted((folder / "data").glob("*.parquet")))]
    splits = {match[1] for name in names if (match := _SHARD.fullmatch(name))}

    def is_shard(name: str) -> bool:
        match = _SHARD.fullmatch(name)
        if match and match[1] not in splits and not force:
            raise ValueError(
                f"{target.repo_id} has the split {match[1]!r}, which this data set has not and would remove; nothing "
                "was published. Publish all splits together (--split all), or pass --force to remove it."
            )
        return match is not None

    uploads = [Upload.of(name, folder / name) for name in names]
    title = f"Publish {', '.join(sorted(splits))}"
    return publish_files(uploads, target, title, description, is_shard, token=token, force=force, dry_run=dry_run)


__all__ = ["publish_dataset", "render_dataset_card"]
