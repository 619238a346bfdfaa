"""YAML written so that readers of YAML 1.1, such as PyYAML, and of YAML 1.2 agree on it."""

import re
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedBase, CommentedMap, CommentedSeq
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

# Text that no reader of YAML 1.1 or 1.2 takes for anything else; all other text is quoted.
PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[a-z_][\w./-]*(?: [\w./-]+)*", re.ASCII | re.IGNORECASE)


def round_trip() -> YAML:
    """Reads and writes documents with their comments."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 2**20
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def text_of(document: Any) -> str:
    """The document as text; lists that no file gave a style go on one line."""
    out = StringIO()
    round_trip().dump(document, out)
    return out.getvalue()


def unshared(value: Any) -> Any:
    """A copy for writing: aliases have become copies, comments are left out."""
    if isinstance(value, dict):
        copy: Any = CommentedMap((key, unshared(below)) for key, below in value.items())
    elif isinstance(value, list):
        copy = CommentedSeq(unshared(below) for below in value)
    else:
        return value
    if value.fa.flow_style() if isinstance(value, CommentedBase) else isinstance(value, list):
        copy.fa.set_flow_style()
    return copy


class _Representer(RoundTripRepresenter):
    def represent_float(self, data: float) -> ScalarNode:
        text = repr(data)
        return self.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))

    def represent_str(self, data: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if PLAIN.fullmatch(data) else '"')

    def represent_none(self, _: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(float, _Representer.represent_float)
_Representer.add_representer(str, _Representer.represent_str)
_Representer.add_representer(type(None), _Representer.represent_none)
