"""Finds out within seconds whether a download can work at all.

TFDS and Keras retry an unreachable host for minutes. One short request
beforehand tells the same in seconds.
"""

import threading
import urllib.error
import urllib.request

PROBE_TIMEOUT_S = 8.0


def unreachable(url):
    """Returns why `url`'s host can't be reached, or None where it answers.

    Any HTTP answer counts as reached, an error status too: it is the download
    itself that has to judge that. Proxies from the environment are used.

    Args:
        url: str. The address that will be downloaded.
    """
    outcome = [f"no answer within {PROBE_TIMEOUT_S:.0f} s"]
    # A socket's timeout bounds neither the name look-up nor the sum over a
    # host's addresses, so the bound is on the thread.
    prober = threading.Thread(target=_probe, args=(url, outcome), daemon=True)
    prober.start()
    prober.join(PROBE_TIMEOUT_S)
    return outcome[0]


def _probe(url, outcome):
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "adabet"})
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()
        outcome[0] = None
    except urllib.error.HTTPError:
        outcome[0] = None
    except (OSError, ValueError) as error:
        outcome[0] = str(getattr(error, "reason", error))
