"""Finds out within seconds whether a download can work at all.

TFDS and Keras retry an unreachable host for minutes. One short request
beforehand tells the same in seconds.
"""

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
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "adabet"})
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None
