"""
Model cards: rendered from what a training run and an evaluation recorded, never typed.

A card ends in a comment with the SHA-256 of all that stands above it. By it `deformvos publish` sees whether a card on
the Hub is still the one that was published, or was edited there and must not be overwritten.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import measurements


TEMPLATES = Path(__file__).resolve().parent / "templates"
_SEAL = re.compile(r"\n*<!-- deformvos card: sha256 ([0-9a-f]{64}) -->\s*\Z")
_BLOCK = re.compile(r"<!-- numbers:[\w.-]+:(?:begin|end) -->\n?")
_TITLES = {
    "davis2016": "DAVIS-2016",
    "davis2017": "DAVIS-2017",
    "youtubevos2018": "YouTube-VOS 2018",
    "youtubevos2019": "YouTube-VOS 2019",
}
# What the code that comes with weights imports, as pyproject.toml bounds it.
_INSTALL = '"torch>=2.6" "transformers>=5.20,<6" "av>=17" "pillow>=10.3"'
_TAGS = ["video-object-segmentation", "deformable-attention", "deformvos"]
_PICTURES = ("picture.jpg", "picture.png")
_OPTION = re.compile(r"(--[\w-]+(?==)|.*)(?:=(.*))?", re.DOTALL)
# What changes what is measured; a score without any is the model's.
_TRADES = re.compile(
    r"--(?:preset|adapt-(?:steps|seed|draws)|short-side|memory-interval|override)[ =]\S+|--adapt-check|--adapt\b(?!-)"
)
_PRIVATE_OPTIONS = ("--json", "--save-masks")  # files that a run wrote, by their places
_SET_OPTIONS = ("--dataset-name", "--dataset_name")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SOURCES = {
    "labels": "labels",
    "pseudo": "the teacher's masks",
    "both": "labels and the teacher's masks",
    "features": "features of a ViT",
}
_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}
# Sequences of DAVIS-2016 train for choices; hf_deformvos.data has them as HELD_OUT_SEQUENCES.
_HELD_OUT = "bmx-bumps, dog-agility, flamingo, kite-walk, scooter-gray, swing"


def seal(text: str) -> str:
    """The text with a last line that tells its checksum."""
    body = _SEAL.sub("", text).rstrip("\n") + "\n"
    return f"{body}\n<!-- deformvos card: sha256 {_checksum(body)} -->\n"


def is_sealed(text: str) -> bool:
    """Whether a text ends in such a line, be it true or not."""
    return _SEAL.search(text) is not None


def is_unedited(text: str) -> bool:
    """Whether a text is what was sealed; line ends and blank lines at the end do not count."""
    text = text.replace("\r\n", "\n")
    match = _SEAL.search(text)
    return match is not None and match[1] == _checksum(text[: match.start()].rstrip("\n") + "\n")


def has_scores(text: str) -> bool:
    """Whether a card's metadata has a `model-index`."""
    metadata = re.match(r"\s*---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    return metadata is not None and re.search(r"^model-index:", metadata[1], re.MULTILINE) is not None


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def runs_of(facts: dict) -> list[dict]:
    """The runs that made the weights, first to last."""
    runs, first = [facts, *facts.get("averaged_with", [])], facts
    while (earlier := first.get("initialised_from")) and "clips" in earlier:
        runs, first = [earlier, *earlier.get("averaged_with", []), *runs], earlier
    return runs


def render_card(folder: str | Path, records: dict[str, dict], repo_id: str | None = None) -> str:
    """
    The card of a release folder.

    Args:
        folder (`str` or `Path`): holds `training.json`, `config.json` and the weights.
        records (`dict[str, dict]`): measurements by name, see [`measurements.find_records`]; those of other weights
            are passed over.
        repo_id (`str`, *optional*): the Hub repository that the examples load from. Without it the card is the one
            that lies in this repository: the examples load the folder, and its figures stand between the comments that
            scripts/update_numbers.py knows.

    Returns:
        `str`: the text, sealed.

    Raises:
        ValueError: if a file is missing or is not what it must be.
    """
    folder = Path(folder)
    facts, config = read_json(folder / "training.json"), read_json(folder / "config.json")
    provenance = json.loads((TEMPLATES / "provenance.json").read_text())
    benchmarks = measurements.own_benchmarks(folder / "model.safetensors", records)
    records = _own_records(folder, records)
    if repo_id:
        records = {name: _as_published(record, repo_id) for name, record in records.items()}
        benchmarks = [_as_published(record, repo_id) for record in benchmarks]
    template = template_environment().get_template("model_card.md.jinja")
    try:
        context = _context(facts, config, provenance, folder, records, repo_id)
        context["benchmarks"] = _benchmark_parts(benchmarks)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'training.json'} lacks what the card states: {error!r}.") from error
    return seal(re.sub(r"\n{3,}", "\n\n", template.render(**context)))


def template_environment():
    """The card templates of this folder."""
    import jinja2  # torch brings it

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _context(facts: dict, config: dict, provenance: dict, folder: Path, records: dict, repo_id: str | None) -> dict:
    """What the template names."""
    runs = runs_of(facts)
    data = sorted({name for run in runs for name in run.get("data", [])})
    kind = provenance["kinds"].get(config.get("backbone"), "")
    name = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    metadata = _metadata(facts, provenance, data, records, name)
    own = facts["settings"]
    saw_held_out = any(run["settings"].get("train_on_held_out", False) for run in runs)
    has_features = any(run["settings"].get("supervision") == "features" for run in runs)
    return {
        "metadata": metadata.to_yaml(line_break="\n").strip(),
        "title": f"DeformVOS {kind}" if kind else name,
        "kind": kind,
        "picture": next((picture for picture in _PICTURES if (folder / picture).is_file()), None),
        "published": repo_id is not None,
        "install": _INSTALL,
        "model": repo_id or f"hub_cards/{name}",
        "video": "video.mp4" if repo_id else "examples/bunny.mp4",
        "mask": "first_mask.png" if repo_id else "examples/bunny_mask.png",
        "parameters": f"{facts['parameters'] / 1e6:.2f}",
        "scores": [_score(name, record, provenance, repo_id is None) for name, record in sorted(records.items())],
        "clips": f"{sum(run['clips'] for run in runs):,}",
        "minutes": f"{sum(run['minutes'] for run in runs):.0f}",
        "precision": _PRECISIONS[own["mixed_precision"]],
        "runs": _runs_table(runs, name),
        "blend": f"{facts['blend']:.0%}" if "blend" in facts else None,
        "averaged": len(facts["averaged_with"]) + 1 if "averaged_with" in facts else None,
        "backbone_rate": f"{own['backbone_lr_scale']:g} times the learning rate for the backbone",
        "data": _data_table(data, provenance, saw_held_out),
        "held_out": _HELD_OUT if "davis2016-train" in data else "",
        "saw_held_out": saw_held_out,
        "is_averaged": any(run["settings"].get("ema_decay", 0.0) > 0 for run in runs),
        "has_pastes": any(_pastes(run["settings"]) for run in runs),
        "saw_rendered": "rendered" in data,
        "small_data": bool(data) and set(data) <= set(provenance["data"]),
        "backbone": _backbones(runs, provenance),
        "features": provenance["features"] if has_features else None,
        "license": metadata.license,
        "distilled": any("teacher" in run for run in runs),
    }


def _metadata(facts: dict, provenance: dict, data: list[str], records: dict, name: str) -> ModelCardData:
    """What the Hub reads of a card."""
    known = set(data) <= set(provenance["data"])
    stated = {provenance["data"][name].get("license") for name in data} - {None} if known else set()
    origin = facts.get("initialised_from", {}).get("name", "")
    teacher = facts.get("teacher", {})
    # The Hub compares models by these: the presets' scores are in the card alone.
    plain = [record for _, record in sorted(records.items()) if not _choices(record)]
    results = [result for record in plain for result in _results(record)]
    other = {} if stated else {"license_name": "see-training-data"}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="mask-generation",
        license=stated.pop() if stated else "other",
        **other,
        tags=_TAGS + (["knowledge-distillation"] if teacher else []),
        # Only Hub repositories can be named in these two; other sets and origins are in the card's tables.
        datasets=[name for name in data if _HUB_NAME.fullmatch(name)] or None,
        base_model=origin if _HUB_NAME.fullmatch(origin) else None,
        model_name=name,
        eval_results=results or None,
    )


def _results(record: dict) -> list[EvalResult]:
    """The measures of a record, each with the command that measured it."""
    title, dataset = _title(record), record["dataset"]
    values = {"J&F": record["totals"]["J&F"], **{key: record["totals"][key]["mean"] for key in "JF"}}
    names = {"J&F": "mean of J and F", "J": "region similarity J, mean", "F": "boundary accuracy F, mean"}
    return [
        EvalResult(
            task_type="mask-generation",
            task_name="Semi-supervised video object segmentation",
            dataset_type=_own_set(record) or dataset["name"],
            dataset_name=title,
            dataset_split=dataset["split"],
            metric_type=key.lower().replace("&", "-and-"),
            metric_name=names[key],
            metric_value=round(value, 4),
            metric_args={"command": record["command"], "weights_sha256": record["weights_sha256"]},
        )
        for key, value in values.items()
    ]


def _words(command: str) -> list[str]:
    """A command's words; `--option=value` is two of them, as `--option value` is."""
    return [part for word in shlex.split(command) for part in _OPTION.fullmatch(word).groups() if part]


def _own_set(record: dict) -> str | None:
    """The data set that a record is of, where it is not the benchmark itself but one scored by its rules."""
    words = _words(record["command"])
    names = [name for option, name in pairwise(words) if option in _SET_OPTIONS]
    return _shown_name(names[-1]) if names else None


def _shown_name(place: str) -> str:
    """A data set as others may know it: by its name on the Hub, or that of its folder without the path."""
    is_on_hub = _HUB_NAME.fullmatch(place) and not place.startswith(".") and not Path(place).exists()
    return place if is_on_hub else Path(place).name or "unnamed"


def _title(record: dict) -> str:
    dataset, choices, own = record["dataset"], _choices(record), _own_set(record)
    title = f"{_TITLES.get(dataset['name'], dataset['name'])} {dataset['split']}"
    if own is not None:
        title = f"{own} {dataset['split']}, by the rules of {_TITLES.get(dataset['name'], dataset['name'])}"
    return f"{title} with `{choices}`" if choices else title


def _choices(record: dict) -> str:
    """The options of a record's command that make another model, or another use of it."""
    return " ".join(re.sub(r"^(--[\w-]+)=", r"\1 ", found[0]) for found in _TRADES.finditer(record["command"]))


def _as_published(record: dict, repo_id: str) -> dict:
    """A record whose command names the Hub repository, and no files of the machine that measured."""
    words, command, skipped = _words(record["command"]), [], False
    for option, word in zip(["", *words], words, strict=False):
        if skipped:
            skipped = False
        elif word in _PRIVATE_OPTIONS:
            skipped = True
        elif word != "--resume":
            command.append(repo_id if option == "--model" else _shown_word(option, word))
    return {**record, "command": shlex.join(command)}


def _shown_word(option: str, word: str) -> str:
    """A word of a command behind an option, without the path that it has on the machine that measured."""
    if option == "--root":
        return Path(word).name or "data"
    return _shown_name(word) if option in _SET_OPTIONS else word


def _score(name: str, record: dict, provenance: dict, markers: bool) -> dict:
    """A record's parts of the card, between markers where the card stays in this repository."""

    def block(suffix: str, text: str) -> str:
        begin, end = (f"<!-- numbers:{name}{suffix}:{side} -->" for side in ("begin", "end"))
        return f"{begin}\n{text}\n{end}" if markers else text

    # A table for each of a dozen ways to use the model would bury the two that matter.
    has_sequences = _choices(record) in ("", "--adapt")
    return {
        "title": _title(record),
        "source": None if _own_set(record) else provenance["benchmarks"].get(record["dataset"]["name"]),
        "is_validation": record["dataset"]["split"] == "val" and not _own_set(record),
        "is_adapted": "--adapt" in _choices(record),
        "has_root": "--root" in record["command"],
        "means": block("", measurements.render_means(record)),
        "sequences": block(".sequences", measurements.render_sequences(record)) if has_sequences else None,
        "speed": measurements.render_speed(record),
    }


def _benchmark_parts(records: list[dict]) -> list[str]:
    """The tables of benchmarks: ours, and beside the peers' where they were timed."""
    if not records:
        return []
    cases = [case for record in records for case in record["cases"]]
    has_times, has_memory = (any(part in case for case in cases) for part in ("frame", "memory"))
    has_peers = any("peers" in record for record in records)
    views = [*[""] * has_times, *["memory"] * has_memory, *["peers"] * has_peers]
    return [measurements.BENCHMARK_VIEWS[view](records) for view in views]


def _own_records(folder: Path, records: dict[str, dict]) -> dict[str, dict]:
    """Those of the folder's own weights, run as they are and not exported."""
    weights = folder / "model.safetensors"
    sha256 = measurements.sha256_of(weights) if weights.is_file() else None
    own = {name: record for name, record in records.items() if sha256 and record.get("weights_sha256") == sha256}
    return {name: record for name, record in own.items() if "totals" in record and "exported" not in record}


def _stages(settings: dict) -> list[dict]:
    """A run's curriculum, which a configuration holds as text or written out; older records may lack it."""
    stages = settings.get("stages", [])
    return json.loads(stages) if isinstance(stages, str) else stages


def _runs_table(runs: list[dict], name: str) -> str:
    """A row a run: what it learned from, for how long, and on clips of which sizes. Other models' runs are named."""
    titles = "| run | learned from | steps | clips | minutes | on | clips of | learning rate |"
    rows = [titles, "|---:|---|---:|---:|---:|---|---|---:|"]
    for number, run in enumerate(runs, start=1):
        settings = run["settings"]
        # A stage's batch is what one process takes at a time.
        passes = run.get("processes", 1) * settings.get("gradient_accumulation_steps", 1)
        clips = "; ".join(
            "{}x{}, {}, {} a step".format(*stage["size"], _counted(stage["frames"], "frame"), passes * stage["batch"])
            for stage in _stages(settings)
        )
        teacher = run.get("teacher", {}).get("name")
        learned = _SOURCES[settings["supervision"]] + (f", distilled from {teacher}" if teacher else "")
        # What learned features saw single images, and is no model.
        if "images" not in run and run.get("name", name) != name:
            learned += f" (as {run['name']})"
        seen = f"{run['images']:,} images" if "images" in run else f"{run['clips']:,}"
        numbers = f"{run['steps']:,} | {seen} | {run['minutes']:.0f} | {run.get('device', 'not recorded')}"
        rows.append(
            f"| {number} | {learned} | {numbers} | {clips or 'not recorded'} | {settings['learning_rate']:g} |"
        )
    return "\n".join(rows)


def _pastes(settings: dict) -> bool:
    """Whether a run pasted objects into its clips."""
    of_stages = [stage.get("paste") or 0.0 for stage in _stages(settings)]
    return max([settings.get("paste", 0.0), settings.get("distractor", 0.0), *of_stages]) > 0


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _backbones(runs: list[dict], provenance: dict) -> str:
    """What the backbones of a lineage started from, as far as its runs recorded it."""
    sources = [run["backbone"] for run in runs if "backbone" in run]
    if not sources:
        return "The record of the training does not say what the backbone started from."
    known = provenance["backbones"]
    return " ".join(
        known.get(source.get("sha256")) or f"The backbone started from the weights of `{source['name']}`."
        for source in sources
    )


def _data_table(data: list[str], provenance: dict, saw_held_out: bool) -> str:
    """A row a data set, with its terms."""
    if not data:
        return "The record of the training does not name the data sets; whoever trained it knows them and their terms."
    rows = ["| set | what | terms, as the source states them |", "|---|---|---|"]
    for name in data:
        entry = provenance["data"].get(name, {"title": name, "what": "-", "terms": "not recorded"})
        title = entry["title"]
        if name == "davis2016-train":
            title += ", all 30 sequences" if saw_held_out else ", 24 of 30 sequences"
        rows.append(f"| {title} | {entry['what']} | {entry['terms']} |")
    return "\n".join(rows)


def is_rendered(folder: Path) -> bool:
    """Whether the card to publish is rendered; if not, it is the folder's own, written by hand."""
    readme = folder / "README.md"
    return (folder / "training.json").is_file() and (
        not readme.is_file() or is_sealed(readme.read_text(encoding="utf-8"))
    )


def publishable_card(folder: str | Path, records: dict[str, dict], repo_id: str) -> str:
    """
    The card to publish: rendered anew where the folder holds `training.json`, else the folder's own.

    A README.md without the seal was written by hand: it is published as it is, sealed.

    Raises:
        ValueError: if there is nothing to render from, a rendered card was edited by hand, or the Hub could not read
            its metadata.
    """
    folder = Path(folder)
    readme = folder / "README.md"
    own = readme.read_text(encoding="utf-8") if readme.is_file() else None
    if own is not None and is_sealed(own) and not is_unedited(own):
        raise ValueError(
            f"{readme} was rendered and then edited by hand: publishing renders it anew and would lose the edits. "
            "Change what it is rendered from, or remove its last line, the comment with the checksum, to publish it "
            "as it is."
        )
    if is_rendered(folder):
        text = render_card(folder, records, repo_id)
    elif own is not None:
        text = seal(_BLOCK.sub("", own))
    else:
        raise ValueError(f"{folder} has no README.md and no training.json to render one from.")
    check_metadata(text, repo_id)
    return text


def check_replaceable(readme: str | Path) -> None:
    """
    Raises:
        ValueError: if a card that is to be rendered was written, or edited, by hand.
    """
    readme = Path(readme)
    if readme.is_file() and not is_unedited(readme.read_text(encoding="utf-8")):
        raise ValueError(
            f"{readme} was written or edited by hand, and rendering it anew would lose that: move it away, or change "
            "what it is rendered from instead."
        )


def check_metadata(text: str, name: str) -> None:
    """
    Raises:
        ValueError: if a card has no metadata that the Hub could read, or no licence.
    """
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    except Exception as error:  # huggingface_hub raises what its YAML reader and its own checks raise
        raise ValueError(f"The metadata of the card of {name} cannot be read: {error}") from error
    missing = [key for key in ("license", "library_name", "pipeline_tag") if not data.get(key)]
    if missing:
        raise ValueError(f"The card of {name} lacks {', '.join(missing)} in its metadata, between the lines of `---`.")


def read_json(path: Path) -> dict:
    """
    Raises:
        ValueError: if the file is missing or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


__all__ = [
    "check_metadata",
    "has_scores",
    "is_rendered",
    "is_sealed",
    "is_unedited",
    "publishable_card",
    "render_card",
    "runs_of",
    "seal",
    "template_environment",
]
