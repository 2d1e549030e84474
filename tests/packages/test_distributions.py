"""What is built: a wheel with the package and nothing else, an sdist whose tests find what they need."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes

import pytest
import yaml

import lightning_maml_guard
from tests.test_readme import ROOT

STRAY = [
    "lightning_maml_guard/__pycache__/cli.cpython-311.pyc",
    "lightning_maml_guard/runs/sinusoid/version_0/metrics.csv",
    "examples/runs/last.ckpt",
    "examples/.ipynb_checkpoints/tutorial-checkpoint.ipynb",
    "examples/lightning_logs/version_0/hparams.yaml",
    "benchmarks/runs/check_memory.json",
    "docs/site/index.html",
    "tests/.lmg_cache/omniglot.npy",
    "tests/omniglot.npz",
    "notes.txt",
    "data/omniglot.npz",
    ".venv/bin/python",
]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", "runs", ".*_cache", ".hypothesis", "*.egg-info", "data"
)
AT_TOP = {
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "PKG-INFO", "README.md", "SECURITY.md",
    "CODE_OF_CONDUCT.md", "pyproject.toml", ".gitignore", ".pre-commit-config.yaml", "recipe/meta.yaml",
}  # fmt: skip
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text()
FILES = re.compile(
    r"lightning_maml_guard/(\w+/)*[\w.]+\.(py|yaml|css|j2|typed)|examples/\w+\.(py|png|ipynb)|(tests|benchmarks)/(\w+/)*\w+\.py"
    r"|tests/constraints(-\w+)?\.txt|tests/resume/\w+\.json|\.ci/\w+|\.github/(\w+/)*\w+\.(yml|md)"
    r"|docs/\w+\.md|docs/images/\w+\.png"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The two archives, made from a copy of the checkout with strays in it."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "checkout", ignore=LEFT_OUT)
    for name in STRAY:
        path = folder / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("astray")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "checkout"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def checkout(*folders):
    """The files in these folders that are no strays."""
    found = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {name for name in found if FILES.fullmatch(name)}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    archive = zipfile.ZipFile(built[0])
    names = set(archive.namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == checkout("lightning_maml_guard")
    assert {"lightning_maml_guard/py.typed", "lightning_maml_guard/pages/report.css"} <= names
    assert {name.partition(".dist-info/")[2] for name in metadata} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip
    (told,) = [archive.read(name) for name in metadata if name.endswith("METADATA")]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (recipe,) = re.findall(r'set version = "([^"]+)"', (ROOT / "recipe" / "meta.yaml").read_text())
    versions = {message_from_bytes(told)["Version"], citation["version"], recipe, lightning_maml_guard.__version__}
    assert len(versions) == 1


def test_the_sdist_holds_what_its_tests_need_and_nothing_else(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == AT_TOP | checkout(
        "lightning_maml_guard", "examples", "tests", "benchmarks", "docs", ".ci", ".github"
    )


def test_the_conda_recipe_needs_what_the_package_needs_but_pyhessian():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>!=\[]", each)[0] for each in project["dependencies"]}
    recipe = (ROOT / "recipe" / "meta.yaml").read_text()
    (run,) = re.findall(r"  run:\n((?:    - .*\n)+)", recipe)
    assert set(re.findall(r"- ([\w-]+)", run)) - {"python"} == wanted - {"pyhessian", "torch"} | {"pytorch", "aiohttp"}
    (without,) = re.findall(r"pip install --no-deps lightning-maml-guard\npip install (.*)\n", COMPATIBILITY)
    assert {re.split(r"[<>!=\[']+", each.strip("'"))[0] for each in without.split()} == wanted - {"pyhessian"}


def test_the_workflows_run_scripts_that_exist():
    for path in (ROOT / ".github" / "workflows").iterdir():
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        scripts = re.findall(r"bash (\.ci/\w+)", str(jobs))
        assert scripts and set(scripts) <= checkout(".ci"), path


def test_names_of_compatibility_are_those_of_the_matrix():
    script = (ROOT / ".ci" / "compatibility").read_text()
    (matrix,) = re.findall(r"versions: \[(.*?)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    names = {matrix, *re.findall(r"versions: ([\w.-]+) }", (ROOT / ".github" / "workflows" / "ci.yml").read_text())}
    assert {"lowest", "newest", "torch-2.6.0"} <= names
    assert all(f"  {name})" in script or name.startswith("torch-") for name in names)
