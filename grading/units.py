r"""Units of measurement, money and things counted: the spellings and the kind of each.

    unit("sq. in.")  ->  "inch^2"      unit("mi/hr")  ->  "mile/hour"      unit("trillion")  ->  ""

To know one more spelling, add it to TABLE after the unit's one name.
"""

import re

from grading.expressions import FUNCTIONS

TABLE = {  # kind: units, each with its one name first; a plural in s or es is understood
    "length": """
        meter metre m mtr, centimeter centimetre cm, millimeter millimetre mm, kilometer
        kilometre km, inch inches in, foot feet ft, yard yd, mile mi, unit""",
    "time": """
        second sec s, minute min, hour hr h, day, week wk, month mo, year yr, millisecond ms,
        decade, century centuries""",
    "mass, volume, area": """
        gram gm g gramme, kilogram kg kilo, milligram mg, ton tonne, pound lb, ounce oz, liter
        litre L, milliliter millilitre mL ml, gallon gal, quart qt, pint pt, cup, teaspoon
        tsp, tablespoon tbsp, acre, hectare, bushel, centimeter^3 cc""",
    "angle": "degree deg °, radian rad",
    "temperature": """
        celsius °C degrees-celsius degrees-C degree-C, fahrenheit °F degrees-fahrenheit
        degrees-F degree-F""",
    "rate": """
        mile/hour mph, kilometer/hour kmph kph kmh, joule J, watt W, newton N, volt V, hertz Hz,
        kilowatt kW, calorie cal""",
    "time of day": "am, pm, noon, o'clock",
    "share": "% percent percentage pct per-cent percentage-point",
    "money": """
        dollar $ USD buck, cent ¢, euro € EUR, pound-sterling £ GBP, yen ¥ JPY, rupee ₹ Rs,
        penny pennies, nickel, dime""",
    "count": """
        animal, apple, baby babies, bag, ball, balloon, banana, battery batteries, bead, bean,
        bee, bill, bird, block, boat, book, bottle, box, boy, bracelet, brick, bus, cake, calf
        calves, can, candle, candy candies, car, card, cat, chair, chicken, child children kid,
        chocolate, choice, class, coin, color, cookie, cow, crate, crayon, cupcake, customer,
        digit, dog, doll, donut doughnut, duck, edge, egg, employee, factor, fish, floor,
        flower, friend, fruit, game, gift, girl, glass, goal, goat, group, guest, hat, house,
        integer, item, job, lap, leaf leaves, leg, lemon, letter, line, loaf loaves, mango, man
        men, marble, mark, meal, member, message, multiple, muffin, necklace, night, notebook,
        nut, orange, outcome, package, packet, pack, page, painting, pair, passenger, peach,
        pear, pen, pencil, permutation, person people persons, photo, picture, piece, pizza,
        plant, plate, player, point, potato, problem, question, rabbit, ribbon, root, rose,
        round, row, sandwich, seat, serving, set, sheep, sheet, shell, shirt, shoe, side, slice,
        solution, song, stamp, star, step, sticker, student, subset, table, team, term, test,
        ticket, children-ticket, adult-ticket, tile, time, tomato, toy, tree, triangle, trip,
        truck, vertex vertices, vote, way, wheel, window, woman women, word, zero""",
}
TAIL = re.compile(  # one character after the other, so that no text makes it slow
    r"(?:\\text\s*\{[^{}]*\}|\^\s*(?:\{\s*\d\s*\}|\d(?!\d)|\\circ(?![a-z]))|[A-Za-z.%€£¥₹¢/\s])+$"
)
NUMBER = re.compile(r"[-+]?[\d.,/\s]*(?:[eE][-+]?\d+|\\frac\s*\{\d+\}\s*\{\d+\})?")
FUNCTION = re.compile(rf"\\(?:{FUNCTIONS})(?![a-z])")
POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3", "squared": "^2", "cubed": "^3"}


def _spellings():
    """Each spelling: (the unit's one name, its kind)."""
    found = {}
    for kind, units in TABLE.items():
        for one_name, *others in (unit.split() for unit in units.split(",")):
            for word in [one_name, *others]:
                plurals = [word + "s", word + "es"] if len(word) > 1 and word[-1].isalpha() else []
                for spelling in [word, *plurals]:
                    found.setdefault(spelling.replace("-", " "), (one_name, kind))
    return found


SPELLINGS = _spellings()


def unit(text):
    """The unit's one name, the same for all its spellings; "" if the text is not a unit."""
    above, *below = re.split(r"\s*/\s*|\b(?:per\s(?!cent)|an?\s)\s*", text.strip())
    parts = [_name(above, "length"), *(_name(part, "time") for part in below)]
    return "/".join(parts) if all(parts) else ""


def _name(text, squared):
    """The one name of a unit without a divisor; squared: the kind that can have an exponent."""
    text = re.sub(r"\b([A-Za-z])\.\s?([A-Za-z])\b", r"\1\2", text)  # a.m. is am
    tokens = re.findall(r"\^\s*\{?\s*[23]\s*\}?|[^\s.{}^]+", text)
    if re.sub(r"[\s.{}]", "", text) != re.sub(r"[\s{}]", "", "".join(tokens)):
        return ""
    powers = [POWERS.get(t, re.sub(r"[\s{}]", "", t)) for t in tokens if t in POWERS or t[0] == "^"]
    words = " ".join(t for t in tokens if t not in POWERS and t[0] != "^")
    name, kind = SPELLINGS.get(words) or len(words) > 1 and SPELLINGS.get(words.casefold()) or ("", "")
    if not powers:
        return name
    return name + powers[0] if len(powers) == 1 and tokens[1:] and kind == squared else ""


def measured(text, letters=False):
    """(value, unit) of "5\\text{ cm}^2" or "5 cm^2"; the unit is "" if there is none.

    letters: one or two letters right after a number can be a unit: in an answer, but not in a gold answer,
    where they are variables.
    """
    tail = TAIL.search(text)
    for i in range(max(tail.start(), 1), len(text)) if tail else ():
        upright = re.match(r"\\text|\^\s*\\circ", text[i:])
        if not upright and not re.match(r"[\d\s)}\]]", text[i - 1]):
            continue
        value, name = text[:i].rstrip(), re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text[i:])
        name = unit(name.replace("^\\circ", " degrees "))
        if not name or not re.search(r"[\w)}\]!|'\\]$", value) or value.endswith("_"):
            continue
        if name == "degree" and FUNCTION.search(value):
            continue  # of the function's argument
        if upright or "\\text" in text[i:] or not _product(value, text[len(value) :], letters):
            return value, name
    return text, ""


def _product(value, tail, letters):
    """Whether the letters after a value are variables and not a unit, as in x^2 m and 2\\sqrt{3}s."""
    word = tail.strip()
    if len(word) <= 2 and word.isalpha() and not letters and not tail[0].isspace():
        return True
    if len(word) == 1 and word.isalpha():
        return word not in "mgshL" or not re.fullmatch(r"[-+]?[\d.,]+", value)
    return not NUMBER.fullmatch(value) and re.search("[A-Za-z]", re.sub(r"\\[a-zA-Z]+", "", value))
