#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes unicode_classes.hpp, the table of character classes that the tokeniser's pattern asks for.

  pip install unicodedata2==16.0.0 && make_unicode_classes.py > unicode_classes.hpp

Without the package Python's own table is taken, of whatever version of Unicode it is; the file says which.
"""
try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata

SPACE = {*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}  # White_Space


def kind(c):
    if c in SPACE:
        return 1
    return {"L": 2, "N": 3}.get(unicodedata.category(chr(c))[0], 0)


def main():
    starts, last = [], None
    for c in range(0x110000):
        if kind(c) != last:
            last = kind(c)
            starts.append(c << 2 | last)
    print("// SPDX-License-Identifier: MIT\n#pragma once")
    print(f"/// @file  Classes of characters, Unicode {unicodedata.unidata_version}: White_Space, letters (L*) and numbers (N*). Written by make_unicode_classes.py.")
    print("///\n/// An entry is the first code point of a run, times 4, plus its class; the run ends where the next begins.\n")
    print("#include <cstdint>\n\nnamespace engine {\n\nenum class character : std::uint8_t { other, space, letter, number };\n")
    print("// clang-format off\ninline constexpr std::uint32_t character_runs[] = {")
    line = " "
    for s in starts:
        if len(line) + len(str(s)) > 138:
            print(line)
            line = " "
        line += f" {s},"
    print(line + "\n};\n// clang-format on\n\n}  // namespace engine")


if __name__ == "__main__":
    main()
