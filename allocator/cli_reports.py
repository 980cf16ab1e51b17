"""The command ``bitplan report``: the page of one plan, of two side by side, or of several reports."""

from pathlib import Path

import click

from allocator.cli_options import low_memory_option, printed, with_progress

_PLAN_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("sources", nargs=-1, metavar="[MODEL | DIRECTORY...]")
@low_memory_option
@click.option("--plan", "plan_path", type=_PLAN_PATH, help="Plan of MODEL to report on.")
@click.option(
    "--compare",
    "compared",
    nargs=2,
    type=_PLAN_PATH,
    metavar="A B",
    help="Two plans of one model, side by side; with MODEL both are measured on evaluation text, without it the "
    "measurements that they carry are shown.",
)
@click.option("--index", is_flag=True, help="One page with links to the reports in the directories that are named.")
@click.option("--text", help="Evaluation text; default: the profile's.")
@click.option("--parquet", is_flag=True, help="Parquet files beside the CSV files; needs the extra 'parquet'.")
@click.option("--pdf", is_flag=True, help="One page as report.pdf; needs an installed Chromium.")
@click.option("--out", required=True, type=_PLAN_PATH, help="Directory of the files.")
@printed
def report(
    sources: tuple[str, ...],
    low_memory: bool,
    plan_path: Path | None,
    compared: tuple[Path, Path] | None,
    index: bool,
    text: str | None,
    parquet: bool,
    pdf: bool,
    out: Path,
) -> str:
    """Write the report of a plan of MODEL (one HTML page and CSV files), compare two, or list several reports.

    \b
    bitplan report MODEL --plan plan.json --out report/
    bitplan report --compare a.json b.json --out comparison/
    bitplan report --index report-a/ report-b/ --out overview/
    """
    _check_one_job(sources, plan_path, compared, index, parquet or pdf)
    if index:
        return _write_index(sources, out)
    model = sources[0] if sources else None
    if compared is not None:
        return _compare(model, low_memory, compared, text, out)
    assert model is not None and plan_path is not None, "checked above"
    from allocator.artefacts import Model
    from allocator.pipeline import report as run
    from allocator.plan_files import load_plan

    opened, plan = Model(model, low_memory=low_memory), load_plan(plan_path)
    return str(with_progress(run, opened, plan, out, text=text, parquet=parquet, pdf=pdf))


def _check_one_job(
    sources: tuple[str, ...], plan_path: Path | None, compared: tuple[Path, Path] | None, index: bool, extra_files: bool
) -> None:
    asked = [name for name, given in (("--plan", plan_path), ("--compare", compared), ("--index", index)) if given]
    if len(asked) != 1:
        msg = f"one of --plan, --compare and --index must be given: got {', '.join(asked) or 'none'}. Name one."
        raise click.UsageError(msg)
    wrong = {
        "--plan": len(sources) != 1,
        "--compare": len(sources) > 1,
        "--index": not sources,
    }
    if wrong[asked[0]]:
        needed = {"--plan": "one MODEL", "--compare": "one MODEL or none", "--index": "the directories of reports"}
        msg = f"{asked[0]} must come with {needed[asked[0]]}: got {len(sources)} names. Correct them."
        raise click.UsageError(msg)
    if extra_files and asked[0] != "--plan":
        msg = f"--parquet and --pdf belong to --plan: got one of them with {asked[0]}. Leave it out."
        raise click.UsageError(msg)


def _compare(model: str | None, low_memory: bool, compared: tuple[Path, Path], text: str | None, out: Path) -> str:
    from allocator.artefacts import Model
    from allocator.comparing import compare
    from allocator.plan_files import load_plan

    if text is not None and model is None:
        msg = "--text must come with MODEL, which is measured on it: got --compare and --text alone. Name the model."
        raise click.UsageError(msg)
    names = tuple(_short_names(compared))
    opened = None if model is None else Model(model, low_memory=low_memory)
    first, second = (load_plan(path) for path in compared)
    return str(with_progress(compare, first, second, out, names=names, model=opened, text=text))


def _short_names(paths: tuple[Path, Path]) -> list[str]:
    """Returns the files' names without ending where these differ, else their paths, else numbers."""
    for names in ([path.stem for path in paths], [str(path) for path in paths]):
        if names[0] != names[1]:
            return names
    return [f"{paths[0]} (first)", f"{paths[1]} (second)"]


def _write_index(sources: tuple[str, ...], out: Path) -> str:
    from reports.index_page import write_index

    return str(write_index([Path(source) for source in sources], out))


REPORT_COMMANDS = (report,)
