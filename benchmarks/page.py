"""What the Space's page weighs and how soon it shows: ``python -m benchmarks.page``.

A Space and a loopback Hub run on this machine. A browser opens the page several times as somebody
new. Then it presses *Try the example* once and waits for the result.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.measure import machine
from tests.support.browser import running_browser, visitor
from tests.support.space_pages import Visit
from tests.support.space_runs import running_town

_PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
_WEIGHT = """[...performance.getEntriesByType('resource'),
    ...performance.getEntriesByType('navigation')].reduce((sum, e) => sum + e.encodedBodySize, 0)"""


def main() -> None:
    """Measure, and print the figures."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    options.add_argument("--times", type=int, default=5)
    times = options.parse_args().times
    with (
        tempfile.TemporaryDirectory() as folder,
        running_town(Path(folder)) as town,
        running_browser() as browser,
    ):
        paints, weights, usable = [], [], []
        for _ in range(times):
            context = visitor(browser, viewport={"width": 1280, "height": 800})
            began = time.monotonic()
            guest = Visit(context.new_page(), town).open()
            usable.append(time.monotonic() - began)
            paints.append(float(guest.page.evaluate(_PAINT)))
            weights.append(int(guest.page.evaluate(_WEIGHT)))
            nodes = int(guest.page.evaluate("document.querySelectorAll('*').length"))
            context.close()
        context = visitor(browser, viewport={"width": 1280, "height": 800})
        began = time.monotonic()
        guest = Visit(context.new_page(), town).open()
        guest.try_example()
        guest.expect_state("Done")
        whole = time.monotonic() - began
        context.close()
    print(f"{machine()}; medians of {times}\n")
    print(f"first paint {statistics.median(paints):.2f} s")
    print(f"everything can be used {statistics.median(usable):.2f} s")
    print(f"page weight {statistics.median(weights) / 1000:.0f} kB, {nodes} elements")
    print(f"from opening the page to the example's result, one click: {whole:.1f} s")


if __name__ == "__main__":
    main()
