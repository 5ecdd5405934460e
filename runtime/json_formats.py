"""Formats of JSON Schema as regular expressions, where the grammar library has none or a looser one.

No look-around is possible. Each follows the grammar of the RFC that the standard names.
"""

from __future__ import annotations


def _date() -> str:
    """RFC 3339 full-date, with the days that a month has; February 29 only in leap years."""
    year = "[0-9]{4}"
    long, short = "(?:0[13578]|1[02])", "(?:0[469]|11)"
    day28, day30 = "(?:0[1-9]|1[0-9]|2[0-8])", "(?:0[1-9]|[12][0-9]|30)"
    by4 = "(?:0[48]|[2468][048]|[13579][26])"  # of two digits, without 00
    leap = f"(?:[0-9]{{2}}{by4}|(?:{by4}|00)00)"
    month = f"(?:{long}-(?:0[1-9]|[12][0-9]|3[01])|{short}-{day30}|02-{day28})"
    return f"(?:{year}-{month}|{leap}-02-29)"


def _time() -> str:
    """RFC 3339 full-time. A leap second ends the day in UTC; beside it only the offsets of real zones are possible."""
    fraction, zero = r"(?:\.[0-9]+)?", "(?:[zZ]|[+-]00:00)"
    offset = "(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
    usual = f"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]{fraction}{offset}"
    leaps = [f"23:59:60{fraction}{zero}"]
    for minutes in range(15, 24 * 60, 15):
        for sign, shift in (("+", minutes), ("-", -minutes)):
            hour, minute = divmod((23 * 60 + 59 + shift) % (24 * 60), 60)
            off = f"[{sign}]{minutes // 60:02}:{minutes % 60:02}"
            leaps.append(f"{hour:02}:{minute:02}:60{fraction}{off}")
    return f"(?:{usual}|{'|'.join(leaps)})"


_IPV4 = r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"


def _ipv6() -> str:
    """RFC 4291, section 2.2: eight groups, the last two perhaps as IPv4, and one run of zeros as '::'."""
    group = "[0-9A-Fa-f]{1,4}"
    last = f"(?:{group}:{group}|{_IPV4})"
    ways = [f"(?:{group}:){{6}}{last}"]
    for before in range(8):  # groups before '::', of at most seven in all
        head = f"{group}(?::{group}){{{before - 1}}}" if before else ""
        after = 7 - before
        tails = [f"(?:{group}:){{0,{after - 2}}}{last}" if after >= 2 else "", group if after >= 1 else ""]
        ways.append(f"{head}::(?:{'|'.join(t for t in tails if t)})?" if after else f"{head}::")
    return f"(?:{'|'.join(ways)})"


_X, _Y = "[A-Za-z0-9]", "[A-Za-z0-9-]"
# RFC 1123; '--' in the third and fourth place is for names of other scripts, whose rules are not regular
_LABEL = f"{_X}(?:{_X}|{_Y}{_X}|{_Y}{_Y}{_X}|{_Y}(?:{_X}{_Y}|-{_X}){_Y}{{0,58}}{_X})?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"


def _email() -> str:
    """RFC 5321 Mailbox."""
    atom = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
    quoted = r'"(?:[ !#-\x5b\x5d-~]|\\[ -~])*"'
    literal = rf"\[(?:{_IPV4}|IPv6:{_ipv6()})\]"
    return rf"(?:{atom}(?:\.{atom})*|{quoted})@(?:{_HOST}|{literal})"


def _uri_reference() -> str:
    """RFC 3986 URI-reference."""
    escape, plain = "%[0-9A-Fa-f]{2}", r"A-Za-z0-9._~!$&'()*+,;=\-"
    char = f"(?:[{plain}:@]|{escape})"
    rest = f"(?:/{char}*)*"
    user = f"(?:[{plain}:]|{escape})*"
    host = rf"(?:\[(?:{_ipv6()}|v[0-9A-Fa-f]+\.[{plain}:]+)\]|(?:[{plain}]|{escape})*)"
    authority = f"(?:{user}@)?{host}(?::[0-9]*)?"
    absolute = f"/(?:{char}+{rest})?"
    first = f"(?:[{plain}@]|{escape})+"  # without ':', which would make it a scheme
    whole = f"[A-Za-z][A-Za-z0-9+.-]*:(?://{authority}{rest}|{absolute}|{char}+{rest})?"
    relative = f"(?://{authority}{rest}|{absolute}|{first}{rest})?"
    end = f"(?:(?:[{plain}:@/?]|{escape})*)"
    return rf"(?:{whole}|{relative})(?:\?{end})?(?:#{end})?"


_POINTER = "(?:/(?:[^/~]|~[01])*)*"

PATTERNS = {
    "date": _date(),
    "time": _time(),
    "date-time": f"{_date()}[tT]{_time()}",
    "hostname": _HOST,
    "email": _email(),
    "ipv6": _ipv6(),
    "uri-reference": _uri_reference(),
    "json-pointer": _POINTER,  # RFC 6901
    "relative-json-pointer": f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
}
"""Format -> expression of the whole text."""

LENGTHS = {"hostname": 253}
"""Characters at most."""
