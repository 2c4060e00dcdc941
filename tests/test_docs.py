"""Every code block of README.md and docs/ runs, or names what there is; every link leads somewhere.

Python blocks run as they stand, in the order of the page, in one namespace and in a folder that `docs_folder` fills.
Comments in HTML right in front of a block say otherwise:

    <!-- anew -->           it starts in a new namespace, as another script
    <!-- given: NAMES -->   it uses these names, which a reader has of his own and `docs_folder.given` makes (there
                            perhaps under another name: NAME=OTHER)
    <!-- not run: why -->   it cannot run here; it is only compiled
    <!-- NAME.py -->        it is also written to that file, which shell blocks may then name

Shell blocks are not run: the modules, files, extras and options that they name are looked up.
"""

import ast
import configparser
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import docs_folder
import engines
import pytest
import torch

import peft_eas

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What they say is looked up as well, but their Python is not run.
OF_EXAMPLES = sorted((ROOT / "examples").rglob("README.md"))
BLOCK = re.compile(r"((?:<!-- [^\n]*? -->\n)*)```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN_MOST = 2  # blocks in all pages


class Block(NamedTuple):
    """A fenced block: its language, code, first line in the page, and the comments in front of it."""

    language: str
    code: str
    line: int
    notes: list[str]

    def note(self, pattern: str) -> re.Match | None:
        return next(filter(None, (re.fullmatch(pattern, note) for note in self.notes)), None)


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match[2], match[3], text[: match.start(3)].count("\n") + 1, re.findall(r"<!-- (.*?) -->", match[1]))
        for match in BLOCK.finditer(text)
    ]
    return [block for block in found if block.language == language]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def parameters(pages: list[Path], language: str | None = None) -> list:
    return [pytest.param(page, id=name(page)) for page in pages if language is None or blocks(page, language)]


@pytest.fixture(scope="session")
def filled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    docs_folder.fill(folder)
    return folder


@pytest.mark.parametrize("page", parameters(PAGES, "python"))
def test_python_blocks_run(page: Path, filled: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("trl", reason="needs the package trl (extra `test`)")
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("peft_eas.ARCHITECTURES", dict(peft_eas.ARCHITECTURES))
    torch.manual_seed(0)
    spaces: list[dict] = [{"__name__": "__main__"}]
    for block in blocks(page, "python"):
        # Line numbers of an error are those of the page.
        code = compile("\n" * block.line + block.code, name(page), "exec")
        if block.note("anew"):
            spaces.append({"__name__": "__main__"})
        if wanted := block.note("given: (.+)"):
            given = docs_folder.given()
            pairs = (one.partition("=") for one in wanted[1].split(", "))
            spaces[-1] |= {one: given[source or one] for one, _, source in pairs}
        if not block.note("not run: .+"):
            exec(code, spaces[-1])
    OUTCOMES.get(name(page), lambda *spaces: None)(*spaces)


def readme_outcome(names: dict) -> None:
    assert len(names["merged"].config.eas["skipped"]) == 10
    assert names["trainer"].model.peft_config["default"].context == "running"
    assert type(names["model"]).__name__ == "EASLlamaForCausalLM"


def tour_outcome(names: dict) -> None:
    assert len(names["merged"].config.eas["skipped"]) == 10
    assert all(Path(picture).stat().st_size > 0 for picture in ("skip_map.png", "search_curve.png"))


def choosing_outcome(names: dict) -> None:
    assert len(names["trainer"].model.peft_config["default"].skipped_modules) == 15
    highest = max(names["similarities"], key=names["similarities"].get)
    skipped = names["model"].peft_config["default"].skipped_modules
    assert highest in skipped
    assert len(skipped) == 10


def loading_outcome(names: dict) -> None:
    assert len(names["merged"].config.eas["skipped"]) == 3
    assert names["model"].get_base_model().is_loaded_in_8bit


def loops_outcome(own: dict, resumed: dict) -> None:
    assert own["search"].bandit.rounds
    assert len(own["merged"].config.eas["skipped"]) == 2
    assert own["model"].peft_config["default"].context == "running"
    assert resumed["search"].is_searching


def limits_outcome(names: dict) -> None:
    prompt, answer = names["prompt_ids"], names["answer_ids"]
    with torch.no_grad():
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = names["model"](input_ids=names["ids"], labels=labels).loss
    torch.testing.assert_close(names["log_likelihood"], -len(answer) * loss)


def models_outcome(names: dict) -> None:
    candidates = {one: len(names[one].base_model.candidates) for one in ("encoder", "vision", "seq2seq")}
    # Of T5, without the first self-attention of each stack of 4.
    assert candidates == {"encoder": 12, "vision": 12, "seq2seq": 3 * 4 - 2}
    for one in ("encoder", "vision"):
        trained = [name for name, weight in names[one].named_parameters() if weight.requires_grad]
        assert any("classifier" in name for name in trained)


def serving_outcome(before: dict, after: dict) -> None:
    assert "layers.0.self_attn" in before["config"].exclude_modules
    assert Path("my-model-decilm", "config.json").is_file()


OUTCOMES = {
    "README.md": readme_outcome,
    "docs/quick_tour.md": tour_outcome,
    "docs/choosing.md": choosing_outcome,
    "docs/limits.md": limits_outcome,
    "docs/loading.md": loading_outcome,
    "docs/loops.md": loops_outcome,
    "docs/models.md": models_outcome,
    "docs/serving.md": serving_outcome,
}


def test_few_blocks_are_not_run() -> None:
    left_out = [block for page in PAGES for block in blocks(page, "python") if block.note("not run: .+")]
    assert len(left_out) <= NOT_RUN_MOST
    notes = {
        note for page in PAGES for lang in ("python", "bash") for block in blocks(page, lang) for note in block.notes
    }
    assert all(re.fullmatch(r"anew|given: .+|not run: .{10,}|\w+\.py", note) for note in notes), notes


# --- shell blocks ----------------------------------------------------------------------------------------------------


def commands(block: Block) -> list[list[str]]:
    """The words of each command, without comments, and with the lines joined that end in a backslash."""
    lines = block.code.replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [[word for word in command if not re.fullmatch(r"[A-Z_]+=\S*", word)] for command in words if command]


def scripts(page: Path) -> set[str]:
    return {block.note(r"(\w+\.py)")[1] for block in blocks(page, "python") if block.note(r"(\w+\.py)")}


def options_of(source: Path, seen: set[Path]) -> set[str]:
    """The options that a program's parser, or one of those that it imports from the examples, may take."""
    if source in seen:
        return set()
    seen.add(source)
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            found |= {
                arg.value for arg in node.args if isinstance(arg, ast.Constant) and str(arg.value).startswith("-")
            }
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("examples", "peft_eas")):
            for path in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                if (file := module_file(path)) is not None:
                    found |= options_of(file, seen)
    return found | {f"--no-{option[2:]}" for option in found}


def module_file(module: str) -> Path | None:
    """The file that `python -m module` runs, or that an import of it reads."""
    path = ROOT.joinpath(*module.split("."))
    return next(filter(Path.is_file, (path / "__main__.py", path.with_suffix(".py"))), None)


def check_options(source: Path, words: list[str]) -> None:
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= options_of(source, set()) | {"--help"}, (source, given)


def check_python(page: Path, words: list[str]) -> None:
    if words[:1] == ["-m"]:
        module, rest = words[1], words[2:]
        if module in ("pytest", "venv"):
            return
        source = module_file(module)
        assert source is not None, f"{name(page)}: no module {module}"
        check_options(source, rest)
    elif words[0] not in scripts(page):
        assert (ROOT / words[0]).is_file(), f"{name(page)}: no file {words[0]}"
        check_options(ROOT / words[0], words[1:])


def check_install(words: list[str]) -> None:
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    for word in words:
        for listed in re.findall(r"^(?:\.|peft_eas)\[(.*)\]$", word):
            assert set(listed.split(",")) <= set(extras["options.extras_require"]), word


def check_own_command(words: list[str]) -> None:
    """`peft-eas COMMAND ...` is installed, and knows the command and its options."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    entry = re.search(r"peft-eas\s*=\s*([\w.]+):", config["options.entry_points"]["console_scripts"])
    source = module_file(entry[1])
    assert f'"{words[0]}"' in source.read_text(encoding="utf-8"), words
    check_options(source, words)


CHECKS = {"pip", "python", "peft-eas", "torchrun", "accelerate", "git", "cd", "ruff", "export"}
CHECKS |= {"vllm", "mlx_lm.generate"}


@pytest.mark.parametrize("page", parameters(PAGES + OF_EXAMPLES, "bash"))
def test_shell_blocks_name_what_there_is(page: Path) -> None:
    for block in blocks(page, "bash"):
        for program, *words in commands(block):
            assert program in CHECKS, f"{name(page)}:{block.line}: {program} is not among {sorted(CHECKS)}"
            if program == "python":
                check_python(page, words)
            elif program == "pip":
                check_install(words)
            elif program == "peft-eas":
                check_own_command(words)
            elif program in ("torchrun", "accelerate"):
                assert any(word in scripts(page) for word in words), (
                    f"{name(page)}: {words} runs no script of the page"
                )


# --- the pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", parameters(PAGES + OF_EXAMPLES))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "http://")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path) if path else page
            assert file.exists(), f"{name(page)}: {target}"
            if anchor:
                assert anchor in anchors(file), f"{name(page)}: {target}"


def anchors(page: Path) -> set[str]:
    """Of each heading, what GitHub makes of it."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    for page in PAGES[1:]:
        assert f"]({name(page)}" in readme, f"README.md has no link to {name(page)}"


@pytest.mark.parametrize("page", parameters(PAGES + OF_EXAMPLES))
def test_tables_are_whole(page: Path) -> None:
    """Each row has as many cells as the head."""
    rows: list[int] = []
    for line in [*page.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            rows.append(len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))))
        else:
            assert len(set(rows)) <= 1, f"{name(page)}: a table above the line {line!r}"
            rows = []


def test_troubleshooting_names_messages_that_there_are() -> None:
    """What it quotes of the library's messages stands in the code, "…" for what differs."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    own = re.sub(r"## (Nothing is reported|Messages of other libraries).*?(?=\n## )", "", page, flags=re.DOTALL)
    said = "\n".join(messages())
    quoted = [
        quote
        for line in own.splitlines()
        if line.startswith("**`")
        for quote in re.findall(r"`([^`]+)`", line.split("**:")[0].split("** on ")[0])
    ]
    assert len(quoted) > 25
    for quote in quoted:
        for part in quote.split("…"):
            assert part.strip() in said, f"docs/troubleshooting.md quotes {quote!r}, which no message says"


def messages() -> list[str]:
    """Every text in the library's code; of an f-string the fixed parts."""
    found = []
    for path in (ROOT / "peft_eas").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_table_of_engines(monkeypatch):
    monkeypatch.setattr(engines, "_version", lambda package, variable: "1.0")
    cells = [("MLX-LM", "llama", "yes"), ("MLX-LM", "bert", "It has no biases."), ("ONNX Runtime", "bert", "yes")]
    lines = engines.table([*cells, ("MLX-LM", "bert", "yes")]).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows == [
        *("| family | MLX-LM, 1.0 | ONNX Runtime, 1.0 |", "| --- | --- | --- |"),
        *("| bert | no (1) | yes |", "| llama | yes |  |"),
    ]
    assert lines[-1] == "1. It has no biases."
