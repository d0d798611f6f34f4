"""The model card of a result: the source's card plus one section."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from llmsurgery.report.controls import controls_of
from llmsurgery.report.numbers import format_number
from llmsurgery.report.strips import interval_text

_HEADING = "## Surgery record"

# Speeds stand in `surgery.json` alone: a card is the same for two runs of the same operation.

_SECTION = """\
{{ heading }}

{% if operation.task == "apply" -%}
This checkpoint was made by llmsurgery {{ manifest.versions.llmsurgery }}: `apply` of the patch with SHA-256 \
`{{ operation.patch.sha256 }}`. {{ changed }} of {{ total }} edited tensors changed. What made the patch is in \
`surgery.json`.
{% elif operation.task == "stack" -%}
This checkpoint was made by llmsurgery {{ manifest.versions.llmsurgery }}: `stack` of the patches with SHA-256 \
{% for patch in operation.patches %}`{{ patch.sha256 }}`{{ ", " if not loop.last }}{% endfor %}. {{ changed }} of \
{{ total }} edited tensors changed. What made the patches is in `surgery.json`.
{% elif manifest.steps is defined -%}
{{ subject }} llmsurgery {{ manifest.versions.llmsurgery }} in {{ manifest.operations | length }} steps: \
{% for one in manifest.operations %}`{{ one.task }} --method {{ one.method }}` ({{ one.paper }}), \
seed {{ one.seed }}{{ "; then " if not loop.last }}{% endfor %}.
{{ changed }} of {{ total }} edited tensors changed. Everything needed to check or repeat it is in `surgery.json`.
{% else -%}
{{ subject }} llmsurgery {{ manifest.versions.llmsurgery }}: \
`{{ operation.task }} --method {{ operation.method }}` ({{ operation.paper }}), seed {{ operation.seed }}.
{{ changed }} of {{ total }} edited tensors changed. Everything needed to check or repeat it is in `surgery.json`.
{% endif %}
{% if manifest.metrics -%}
| metric |{% if aligned %} aligned |{% endif %} before | after | 95% interval | rows | better |
|---|{% if aligned %}---|{% endif %}---|---|---|---|---|
{% for name, metric in manifest.metrics.items() if not name.startswith("speed.") -%}
| {{ name }} |{% if aligned %} {{ number(metric.aligned.value) if "aligned" in metric else "" }} |{% endif %} \
{{ number(metric.before.value) }} | {{ number(metric.after.value) }} | {{ interval(metric.after.interval) }} \
| {{ metric.after.n }} \
| {{ metric.direction }} |
{% endfor %}
{% endif -%}
{% if controls -%}
{{ controls.title }}:

| {{ controls.columns | join(" | ") }} |
|{% for _ in controls.columns %}---|{% endfor %}
{% for row in controls.rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
{% endif -%}
{% if manifest.data -%}
Data: {% for name, entry in manifest.data.items() %}{{ name }} ({{ entry.rows }} rows, SHA-256 \
`{{ entry.sha256[:16] }}`){{ ", " if not loop.last }}{% endfor %}.

{% endif -%}
{% for gate in manifest.gates -%}
- gate `{{ gate.gate }}`: {{ "held" if gate.passed else "failed" }} ({{ number(gate.value) }})
{% endfor -%}
{% for notice in manifest.notices -%}
- note: {{ notice }}
{% endfor %}
{% if manifest.save == "full" -%}
`llmsurgery verify DIR` checks every file of this directory\
{{ ", `llmsurgery revert DIR -o BASE` gives the source back" if manifest.cost.undo_bytes is not none }}.
{% endif -%}
"""

_SUBJECTS = {
    "full": "This checkpoint was changed by",
    "patch": "This directory holds no model but a patch, `patch.safetensors`, for the model described above, made by",
    "adapter": "This directory holds no model but a peft adapter for the model described above, made by",
}


@cache
def _section() -> Template:
    # Compiling it takes longer than many a step of training.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(_SECTION)


def write_card(manifest: Mapping[str, Any], source_card: str) -> str:
    """Return the card of a result.

    Args:
        manifest: The manifest of the run.
        source_card: The source's README.md, empty if it has none.

    Returns:
        Markdown; a record of an earlier operation is kept above the new one.
    """
    tensors = manifest["tensors"].values()
    section = _section().render(
        heading=_HEADING,
        subject=_SUBJECTS[manifest["save"]],
        manifest=manifest,
        operation=manifest["operations"][-1],
        aligned=any("aligned" in metric for metric in manifest["metrics"].values()),
        changed=sum(tensor["sha256_before"] != tensor["sha256_after"] for tensor in tensors),
        total=len(tensors),
        number=format_number,
        interval=interval_text,
        controls=controls_of(manifest),
    )
    return (source_card.rstrip() + "\n\n" if source_card.strip() else "") + section.rstrip() + "\n"
