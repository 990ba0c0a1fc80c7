"""Headers at the corners of the format, by name: the JSON and as many bytes of tensors as follow it."""

from __future__ import annotations

_E = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def _with_field(field: str) -> str:
    return '{"w":{"dtype":"U8",' + field + ',"shape":[1],"data_offsets":[0,1]}}'


def _shaped(shape: str, offsets: str = "0,0", dtype: str = "U8") -> str:
    return f'{{"w":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{offsets}]}}}}'


def _nested(depth: int) -> str:
    return _with_field('"x":' + "[" * depth + "]" * depth)


_TEXT: dict[str, tuple[str, int]] = {
    "plain": (f'{{"w":{_E}}}', 1),
    "metadata": (f'{{"__metadata__":{{"format":"pt"}},"w":{_E}}}', 1),
    "two tensors": (f'{{"b":{_shaped("2", "1,3")[5:-1]},"a":{_E}}}', 3),
    # Names and keys that are given twice.
    "name twice": (f'{{"w":{_E},"w":{_E}}}', 1),
    "name twice, first one bad": (f'{{"w":{{"dtype":"U8","shape":[9],"data_offsets":[0,1]}},"w":{_E}}}', 1),
    "name twice, once escaped": (f'{{"w":{_E},"\\u0077":{_E}}}', 1),
    "dtype twice": (_with_field('"dtype":"U8"'), 1),
    "shape twice": (_with_field('"shape":[1]'), 1),
    "other field twice": (_with_field('"x":1,"x":2'), 1),
    "key inside another field twice": (_with_field('"x":[1,{"a":2,"a":3}]'), 1),
    "metadata twice": (f'{{"__metadata__":{{"a":"b"}},"__metadata__":{{"a":"c"}},"w":{_E}}}', 1),
    "null metadata twice": ('{"__metadata__":null,"__metadata__":null}', 0),
    "bad metadata, then good": ('{"__metadata__":{"a":1},"__metadata__":{"a":"c"}}', 0),
    "metadata key twice": (f'{{"__metadata__":{{"a":"b","a":"c"}},"w":{_E}}}', 1),
    # Metadata.
    "escaped metadata": ('{"__metadat\\u0061__":{"a":"b"}}', 0),
    "metadata null": ('{"__metadata__":null}', 0),
    "metadata list": ('{"__metadata__":[]}', 0),
    "metadata with null": ('{"__metadata__":{"a":null}}', 0),
    "metadata like a tensor": (f'{{"__metadata__":{_E}}}', 1),
    # Unicode.
    "surrogate pair": (f'{{"\\ud83d\\ude00":{_E}}}', 1),
    "leading surrogate": (f'{{"\\ud83d":{_E}}}', 1),
    "trailing surrogate": (f'{{"\\ude00":{_E}}}', 1),
    "two leading surrogates": (f'{{"\\ud83d\\ud83d":{_E}}}', 1),
    "surrogate in a metadata value": ('{"__metadata__":{"a":"\\ud83d"}}', 0),
    "surrogate in a metadata key": ('{"__metadata__":{"\\ud83d":"a"}}', 0),
    "surrogate in another field": (_with_field('"x":["\\ud83d"]'), 1),
    "surrogate in another field's name": (_with_field('"\\ud83d":1'), 1),
    "empty name": (f'{{"":{_E}}}', 1),
    "NUL in a name": (f'{{"\\u0000":{_E}}}', 1),
    "control character in a name": (f'{{"a\x01":{_E}}}', 1),
    "tab in a name": (f'{{"a\t":{_E}}}', 1),
    "DEL in a name": (f'{{"a\x7f":{_E}}}', 1),
    "unknown escape": (f'{{"a\\x":{_E}}}', 1),
    "noncharacter": (f'{{"\uffff":{_E}}}', 1),
    # Numbers.
    "NaN": (_with_field('"x":NaN'), 1),
    "Infinity": (_with_field('"x":-Infinity'), 1),
    "number out of range": (_with_field('"x":1e999'), 1),
    "number out of range, negative": (_with_field('"x":-1.5e400'), 1),
    "zero with a large exponent": (_with_field('"x":0e99999999999999'), 1),
    "tiny number": (_with_field('"x":1e-99999999999999'), 1),
    "long fraction": (_with_field(f'"x":0.{"0" * 400}1e400'), 1),
    "largest float": (_with_field('"x":1.7976931348623157e308'), 1),
    "just above the largest float": (_with_field('"x":1.7976931348623158e308'), 1),
    "largest float as a whole number": (_with_field('"x":17976931348623157' + "0" * 292), 1),
    "whole number of 300 digits": (_with_field('"x":' + "9" * 300), 1),
    "whole number of 5000 digits": (_with_field('"x":' + "9" * 5000), 1),
    "negative whole number of 5000 digits": (_with_field('"x":-' + "9" * 5000), 1),
    "leading zero": (_shaped("01", "0,1"), 1),
    "plus": (_shaped("+1", "0,1"), 1),
    "minus zero": (_shaped("-0"), 0),
    "float size": (_shaped("1.0", "0,1"), 1),
    "exponent size": (_shaped("1e0", "0,1"), 1),
    "null size": (_shaped("null", "0,1"), 1),
    "text size": (_shaped('"1"', "0,1"), 1),
    "boolean size": (_shaped("true", "0,1"), 1),
    "2**63 and nothing": (_shaped(f"{2**63},0"), 0),
    "2**64 - 1 and nothing": (_shaped(f"{2**64 - 1},0", dtype="F32"), 0),
    "2**64 and nothing": (_shaped(f"0,{2**64}"), 0),
    "overflow after nothing": (_shaped(f"0,{2**32},{2**32}", dtype="F32"), 0),
    "overflow before nothing": (_shaped(f"{2**32},{2**32},0", dtype="F32"), 0),
    "overflow of bits only": (_shaped(str(2**62), f"0,{2**61}", dtype="F4"), 0),
    "huge equal offsets": (_shaped("0", f"{2**64 - 1},{2**64 - 1}"), 0),
    # Nesting.
    "nested 125 deep": (_nested(125), 1),
    "nested 126 deep": (_nested(126), 1),
    "nested 500 deep": (_nested(500), 1),
    "nested 100000 deep": (_nested(100_000), 1),
    "nested deep in the metadata": ('{"__metadata__":{"a":' + "[" * 200 + "]" * 200 + "}}", 0),
    # Around the object.
    "space before": (" \t\r\n{}", 0),
    "space after": ("{}\t\n\r ", 0),
    "no-break space before": ("\u00a0{}", 0),
    "form feed after": ("{}\x0c", 0),
    "NUL after": ("{}\0\0", 0),
    "two objects": ("{}{}", 0),
    "byte order mark": ("\ufeff{}", 0),
    "nothing": ("", 0),
    "one bracket": ("{", 0),
    "null": ("null", 0),
    "list": ("[[],{}]", 0),
    "comment": ("{/*a*/}", 0),
    "comma at the end": (f'{{"w":{_E},}}', 1),
    "bytes of no tensor": ("{}", 1),
    # Entries.
    "other field": (_with_field('"x":[1,{"a":2}]'), 1),
    "entry as a list": ('{"w":["U8",[1],[0,1]]}', 1),
    "entry as a long list": ('{"w":["U8",[1],[0,1],1]}', 1),
    "entry as a short list": ('{"w":["U8",[1]]}', 1),
    "null entry": ('{"w":null}', 0),
    "offsets as an object": ('{"w":{"dtype":"U8","shape":[1],"data_offsets":{"0":0,"1":1}}}', 1),
    "escaped dtype": ('{"w":{"dtype":"\\u00558","shape":[1],"data_offsets":[0,1]}}', 1),
    "dtype in small letters": (_shaped("1", "0,1", "u8"), 1),
    "dtype as an object": ('{"w":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}', 1),
    "dtype as an object in a list": ('{"w":[{"U8":null},[1],[0,1]]}', 1),
    "dtype as an object of a list": ('{"w":{"dtype":{"U8":[]},"shape":[1],"data_offsets":[0,1]}}', 1),
    "dtype as an object of two": ('{"w":{"dtype":{"U8":null,"x":1},"shape":[1],"data_offsets":[0,1]}}', 1),
    "dtype as an object that repeats": ('{"w":{"dtype":{"U8":null,"U8":null},"shape":[1],"data_offsets":[0,1]}}', 1),
    "dtype as an empty object": ('{"w":{"dtype":{},"shape":[1],"data_offsets":[0,1]}}', 1),
    # Places.
    "empty tensors at one place": (f'{{"a":{_shaped("0")[5:-1]},"b":{_shaped("0")[5:-1]},"c":{_E},"d":{_shaped("0", "1,1")[5:-1]}}}', 1),
    "empty tensor inside another": (f'{{"a":{_shaped("2", "0,2")[5:-1]},"b":{_shaped("0", "1,1")[5:-1]}}}', 2),
    "empty tensor past the end": (_shaped("0", "1,1"), 0),
    "overlap": (f'{{"a":{_shaped("2", "0,2")[5:-1]},"b":{_shaped("2", "1,3")[5:-1]}}}', 3),
    "hole": (f'{{"a":{_shaped("1", "0,1")[5:-1]},"b":{_shaped("1", "2,3")[5:-1]}}}', 3),
    "F4": (_shaped("2", "0,1", "F4"), 1),
    "F4 in half a byte": (_shaped("1", "0,1", "F4"), 1),
    "F4 in no byte": (_shaped("1", "0,0", "F4"), 0),
    "F6": (_shaped("4", "0,3", "F6_E2M3"), 3),
    "F6 in parts of bytes": (_shaped("2", "0,1", "F6_E3M2"), 1),
}

CORNERS: dict[str, tuple[bytes, int]] = {name: (text.encode(), size) for name, (text, size) in _TEXT.items()} | {
    "surrogate in UTF-8": (b'{"\xed\xa0\x80":' + _E.encode() + b"}", 1),
    "overlong UTF-8": (b'{"\xc0\x80":' + _E.encode() + b"}", 1),
    "cut UTF-8": (b'{"\xc3":' + _E.encode() + b"}", 1),
}

TOKENS = (
    *('"w"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"U8"', '"F4"', '"F6_E2M3"', '"F32"', '"BOOL"', "[0,1]", "[0,0]"),
    *("[1]", "[]", "{}", "null", "true", "NaN", "-0", "1e0", "1.0", "18446744073709551615", "9223372036854775808", "1e308", "\\ud83d"),
    *("\\u0077", "[[[[[[[[", '{"U8":null}', ",", ":", "{", "}", "[", "]", '"', " "),
)
