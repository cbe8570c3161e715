"""What `make test` ends with: how many tests passed, were skipped (and why) and failed, in a line.

    python tests/summary.py build/test-reports

The folder has a report of every test binary and suite, NAME.xml, and ctest-LABEL.xml of what ctest
saw of them: one that ended without a report (a crash, a time-out), or that was not run and left
none, counts as a failure, and a label without tests is named.
"""

import collections
import pathlib
import re
import sys
import xml.etree.ElementTree


def cases(path: pathlib.Path):
    return xml.etree.ElementTree.parse(path).iter("testcase")


def reason(skipped: xml.etree.ElementTree.Element) -> str:
    """GoogleTest puts a line with the place first."""
    text = re.sub(r"^\S+:\d+\n", "", skipped.get("message") or "")
    return " ".join(text.split()) or "no reason given"


def summary(reports: pathlib.Path) -> str:
    passed, failed, reasons = 0, 0, collections.Counter()
    failed_suites = set()
    by_ctest = {path: list(cases(path)) for path in sorted(reports.glob("ctest-*.xml"))}
    suites = sorted(set(reports.glob("*.xml")) - set(by_ctest))
    for path in suites:
        for case in cases(path):
            if case.find("failure") is not None or case.find("error") is not None:
                failed += 1
                failed_suites.add(path.stem)
            elif (skipped := case.find("skipped")) is not None:
                reasons[reason(skipped)] += 1
            elif case.get("status") == "notrun":  # of GoogleTest
                reasons["disabled"] += 1
            else:
                passed += 1
    counted = {"fail": failed_suites, "notrun": {path.stem for path in suites}}
    failed += sum(case.get("name") not in counted[case.get("status")]
                  for found in by_ctest.values() for case in found if case.get("status") in counted)
    why = "; ".join(f"{count} {text}" for text, count in reasons.most_common())
    skipped = f"{reasons.total()} skipped" + (f" ({why})" if why else "")
    empty = "".join(f"; no {path.stem.removeprefix('ctest-')} tests"
                    for path, found in by_ctest.items() if not found)
    return f"tests: {passed} passed, {skipped}, {failed} failed{empty}"


if __name__ == "__main__":
    print(summary(pathlib.Path(sys.argv[1])))
