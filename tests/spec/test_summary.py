"""The line that `make test` ends with counts every test once, and hides none."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

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
<testcase name="e2e_pytest" status="fail"/><testcase name="y_test" status="notrun"/>
</testsuite>"""


def test_counts_and_reasons_and_what_crashed(tmp_path):
    for name, text in (("x_test", GOOGLETEST), ("e2e_pytest", PYTEST), ("ctest-unit", CTEST)):
        (tmp_path / f"{name}.xml").write_text(text)
    assert summary(tmp_path) == "tests: 2 passed, 3 skipped (2 no GPU; 1 slow), 3 failed"


def test_nothing_is_said_so(tmp_path):
    assert summary(tmp_path) == "tests: 0 passed, 0 skipped, 0 failed"
