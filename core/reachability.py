"""Checks within seconds whether the host of a download answers.

TFDS and Keras retry an unreachable host for minutes.
"""

import threading
import urllib.error
import urllib.request

PROBE_TIMEOUT_S = 8.0


def unreachable(url: str) -> str | None:
    """Returns why the host of `url` cannot be reached, or None if it answers.

    Any HTTP answer counts, an error status too: the download itself has to handle that.
    Proxies from the environment are used.
    """
    outcome = [f"no answer within {PROBE_TIMEOUT_S:.0f} s"]
    # A socket's timeout does not bound the name look-up or the sum over a host's addresses.
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
