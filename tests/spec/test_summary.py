"""`make test` runs every label; the line that it ends with counts every test once, hides none."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from summary import summary  # noqa: E402

GOOGLETEST = """<testsuites><testsuite name="A">
<testcase name="One" status="run" result="completed"/>
<testcase name="Off" status="notrun" result="suppressed"/>
<testcase name="Two" status="run" result="skipped">
<skipped message="tests/kernels/cuda/x_test.cc:7&#x0A;no GPU"><![CDATA[...]]></skipped></testcase>
<testcase name="Three" status="run" result="skipped">
<skipped message="tests/kernels/cuda/y_test.cc:9&#x0A;no GPU"/></testcase>
</testsuite></testsuites>"""
PYTEST = """<testsuites><testsuite>
<testcase classname="e2e" name="a"/>
<testcase classname="e2e" name="b"><skipped type="pytest.skip" message="slow"/></testcase>
<testcase classname="e2e" name="c"><failure message="no"/></testcase>
<testcase classname="e2e" name="d"><error message="fixture"/></testcase>
</testsuite></testsuites>"""
CTEST = """<testsuite>
<testcase name="x_test" status="run"/><testcase name="crashed_test" status="fail"/>
<testcase name="e2e_pytest" status="fail"/><testcase name="skipped_test" status="notrun"/>
<testcase name="missing_test" status="notrun"/>
</testsuite>"""


ALL_PASSED = '<testsuites><testsuite><testcase name="a" status="run"/></testsuite></testsuites>'


def test_counts_and_reasons_and_what_crashed_or_was_not_run(tmp_path):
    for name, text in (("x_test", GOOGLETEST), ("e2e_pytest", PYTEST), ("ctest-unit", CTEST),
                       ("skipped_test", "<testsuites/>")):
        (tmp_path / f"{name}.xml").write_text(text)
    assert summary(tmp_path) == ("tests: 2 passed, 4 skipped (2 no GPU; 1 slow; 1 disabled), "
                                 "4 failed")


def test_nothing_is_said_so(tmp_path):
    (tmp_path / "ctest-gpu.xml").write_text("<testsuite/>")
    assert summary(tmp_path) == "tests: 0 passed, 0 skipped, 0 failed; no gpu tests"


@pytest.mark.parametrize("passes, green, line", [
    (dict(unit=True, e2e=True), True, "2 passed, 0 skipped, 0 failed; no gpu tests"),
    (dict(unit=False, gpu=True, e2e=True), False, "2 passed, 0 skipped, 1 failed"),
    (dict(unit=True, gpu=True), False, "2 passed, 0 skipped, 0 failed; no e2e tests"),
    (dict(gpu=True, e2e=True), False, "2 passed, 0 skipped, 0 failed; no unit tests"),
], ids=["without gpu", "unit fails", "e2e is lost", "unit is lost"])
def test_make_test(tmp_path, passes, green, line):
    """The rule itself, on labels of a test each: one that passes leaves a report."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "build").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "tests/summary.py", tmp_path / "tests")
    (tmp_path / "report.xml").write_text(ALL_PASSED)
    (tmp_path / "build/CTestTestfile.cmake").write_text("".join(
        f'add_test({label}_test cp "{tmp_path}/report.xml" '
        f'"{tmp_path}/{"build/test-reports" if good else "missing"}/{label}_test.xml")\n'
        f"set_tests_properties({label}_test PROPERTIES LABELS {label})\n"
        for label, good in passes.items()))
    done = subprocess.run(
        ["make", "-o", "build", "-o", "build/venv/.complete", "test", f"PYTHON={sys.executable}"],
        cwd=tmp_path, env={name: value for name, value in os.environ.items() if "MAKE" not in name},
        capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == f"tests: {line}", done.stdout
    assert (done.returncode == 0) == green, done.stderr
