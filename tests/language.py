"""The project's language, as far as it can be matched: python -m tests.language [PATH...]

The rules are those of CONTRIBUTING.md, "Language". This program looks at Markdown outside code
blocks, and at the comments, strings and docstrings of Python files.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("README.md", "CONTRIBUTING.md", "docs", "seqkd", "actors", "scripts", "tests", "configs")
RATED = "step|token|second|sequence|prompt|row|rank|minute|hour|node|process|actor|engine|group"

PHRASES = {
    r"(go(es)?|went|gone|going) on( |\b)(?!and off)": "continue, resume, keep running",
    r"mend(s|ed|ing)?\b": "fix",
    r"beside\b": "next to, compared with, in parallel with, in addition to",
    r"(left|leaves?|leaving) out\b": "omitted, dropped, skipped; for config keys 'if unset'",
    r"(is|are|was|were|be|been) (said|told)\b": "reports, prints, specifies, determines",
    r"(tell|told|telling|tells) (\w+ )?apart\b": "statistically distinguishable, significant",
    r"(fall|falls|fell|falling) silent\b": "length collapse",
    r"(runs?|ran|running) on (to|until)\b": "outputs run to the token limit",
    r"anew\b": "again",
    r"at work\b": "running",
    r"by turns\b": "alternately",
    r"likewise\b": "the same",
    r"if need be\b": "if necessary",
    r"learnt\b": "learned",
    r"\w*(colour|behaviour|favour|neighbour)\w*": "American spelling",
    r"\w*(tokenis|normalis|initialis|summaris|optimis|quantis|serialis|regularis|recognis)\w*": (
        "American spelling"
    ),
    r"(labelled|modelled|travell\w+|distils|whilst|amongst|centre)\b": "American spelling",
    rf"(nats|tokens|bytes|[GM]iB|seconds|times|once|twice|lines?|files?|prompts|completions|"
    rf"samples) an? ({RATED})\b": "per",
}
"""What is refused, with what to write instead."""

PATTERNS = {re.compile(rf"\b({p})", re.IGNORECASE): better for p, better in PHRASES.items()}
FIRST_WORDS = {"Of", "What", "Whether", "As", "Who", "Whose", "Where", "How"}
VAGUE_NAMES = {"of", "ours", "theirs", "found", "made", "every", "given", "known"}


class Finding(NamedTuple):
    file: Path
    line: int
    text: str
    better: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text!r}: {self.better}"


def check(file: Path) -> Iterator[Finding]:
    """Return what is refused in a file."""
    source = file.read_text()
    texts = _markdown(source) if file.suffix == ".md" else _texts(file, source)
    for line, text in texts:
        for pattern, better in PATTERNS.items():
            for match in pattern.finditer(text):
                yield Finding(file, line + text.count("\n", 0, match.start()), match[0], better)
    if file.suffix == ".py":
        yield from _code(file, ast.parse(source))


def _markdown(source: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, so that a phrase is seen across a line break; without code."""
    source = re.sub(r"```.*?```", lambda m: "\n" * m[0].count("\n"), source, flags=re.DOTALL)
    source = re.sub(r"`[^`\n]*`|\]\([^)\n]*\)", lambda m: "`" * len(m[0]), source)
    yield 1, source


def _texts(file: Path, source: str) -> Iterator[tuple[int, str]]:
    if file.suffix in {".yaml", ".yml", ".html"}:
        yield 1, source
    elif file.suffix == ".py":
        comment, begin, last = "", 0, -1  # lines of comment that follow each other are one text
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            line = token.start[0]
            if token.type == tokenize.COMMENT:
                if line == last + 1:
                    comment += "\n" + token.string
                else:
                    yield begin, comment
                    comment, begin = token.string, line
                last = line
            elif token.type in {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}:
                yield line, token.string
        yield begin, comment


def _code(file: Path, tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        else:
            name = ""
        if name in VAGUE_NAMES:
            yield Finding(file, node.lineno, name, "a noun")
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            doc = node.value.value
            words = doc.split(maxsplit=1) if isinstance(doc, str) else []
            if words and words[0] in FIRST_WORDS:
                better = "a verb in the imperative (functions), a noun phrase (all else)"
                yield Finding(file, node.lineno, f"{words[0]} ...", better)


def files(paths: list[Path]) -> Iterator[Path]:
    """Return the files to check, without this one, which names what it refuses."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if (
                file.is_file()
                and file.suffix in {".py", ".md", ".yaml", ".yml", ".html"}
                and file != Path(__file__)
            ):
                yield file


def main(arguments: list[str]) -> int:
    paths = [Path(a) for a in arguments] or [ROOT / folder for folder in FOLDERS]
    findings = [finding for file in files(paths) for finding in check(file)]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
