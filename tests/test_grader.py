"""A table of answers, grouped by kind: add a line to a group.

Then what the grader does with hostile answers, and with its workers.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, torchrun

import grader
import grading
from grading import answers, symbolic
from grading.symbolic import Workers

SAME = {  # kind: "answer | gold"
    "fractions": r"""
        1/2 | \frac{1}{2}
        \dfrac12 | \frac{1}{2}
        \tfrac{1}{2} | \frac12
        \frac{-1}{2} | -\frac{1}{2}
        0.5 | \frac12
        .5 | 0.5
        1\frac{1}{2} | \frac{3}{2}
        11\frac12 | 11.5
        3 1/2 | \frac{7}{2}
        \frac{2}{4} | \frac{1}{2}
    """,
    "numbers": r"""
        1,080 | 1080
        1080 | 1,080
        900,\!000,\!000 | 900000000
        1{,}234 | 1234
        42. | 42
        $42$ | 42
        042 | 42
        2^{10} | 1024
        5! | 120
        1.2\times 10^5 | 120000
        -0 | 0
        +7 | 7
    """,
    "units": r"""
        5\text{ cm} | 5
        5 | 5\text{ cm}
        5 cm | 5
        12 \text{ square inches} | 12
        5\mbox{ cm}^2 | 5
        30^\circ | 30
        30 | 30^{\circ}
        90 degrees | 90
        \$5 | 5
        5 | \$5
        5\% | 5
        5 | 5\%
        10\sqrt{3}\text{ square units} | 10\sqrt{3}
    """,
    "spacing and size": r"""
        \left( \frac{11}{2}, -1, 1 \right) | (\frac{11}{2},-1,1)
        14\pi | 14 \pi
        \displaystyle 5 | 5
        3\,000 | 3000
        \mathbf{42} | 42
        \boldsymbol{42} | 42
        **42** | 42
        \textbf{42} | 42
    """,
    "labels": r"""
        x = 5 | 5
        5 | x=5
        x=5 | x = 5
        y = 2x+3 | 2x + 3
        f(x) = x+1 | x+1
        x \in [1,2] | [1,2]
    """,
    "sets and lists": r"""
        3, 5 | 5,3
        \{1,2\} | 2,1
        3 \text{ or } 5 | 5, 3
        2, 3, and 5 | 5,3,2
        4,6,14,15 | 15, 14, 6, 4
        1 \pm \sqrt{2} | 1+\sqrt2, 1-\sqrt 2
        \pm 2 | 2, -2
    """,
    "tuples and intervals": r"""
        (1,2) | (1, 2)
        (1/2,2) | \left(\frac12,2\right)
        (-\infty, -14)\cup(-3,\infty) | (-3,\infty) \cup (-\infty,-14)
        [0,1) | [0, 1)
        (-\infty,4] | \left(-\infty, 4\right]
    """,
    "matrices": r"""
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
        \begin{bmatrix}1\\0.5\end{bmatrix} | \begin{pmatrix} 1 \\ \frac{1}{2} \end{pmatrix}
    """,
    "expressions": r"""
        2\sqrt{2} | \sqrt{8}
        \frac{\sqrt{2}}{2} | \frac{1}{\sqrt{2}}
        \frac{16\pi}{3} | \frac{16}{3}\pi
        2.5\pi | \frac{5\pi}{2}
        (x+1)^2 | x^2+2x+1
        x(x-1)(x+1) | x^3-x
        6+9i | 9i+6
        \sqrt3 | \sqrt{3}
        3\sqrt[3]{2} | \sqrt[3]{54}
        2^{1/2} | \sqrt{2}
        \frac{1}{x+1} | (x+1)^{-1}
    """,
    "choices and words": r"""
        (A) | \text{(A)}
        A | \text{(A)}
        \text{E} | E
        \textbf{(B)} | (B)
        \text{Yes} | yes
        \text{Monday} | Monday
        \text{ellipse}. | \text{ellipse}
    """,
    "products of letters": r"""
        2ab | 2ba
        2r^2h | 2hr^2
        \pi r^2 h | \pi hr^2
        y-x | -x+y
        -(x-y) | y-x
        xy | yx
        pi | \pi
        2pi | 2\pi
        2**3 | 8
        AB = 5 | 5
        \angle ABC = 30 | 30
    """,
    "names of units": r"""
        10 percent | 10\%
        5 m | 5 meters
        5 \text{ square cm} | 5
    """,
    "bases and times": r"""
        52_7 | 52_{7}
        1011_2 | 1011_{2}
        5:30 | 5:30
    """,
    "letters keep their case": r"""
        \pi(R^2-r^2) | \pi(R-r)(R+r)
        \frac{M-m}{M+m} | \frac{M - m}{m + M}
        2\Omega | \Omega + \Omega
        \Delta x | x\Delta
    """,
    "relations": r"""
        x \ge 5 | x >= 5
        5 \leq x | x ≥ 5
        x\ne 3 | x != 3
        2x > 10 | x > 5
        -x < 3 | x > -3
        2 < x < 5 | 5 > x > 2
        x=2 | 2=x
        x^2+y^2-25=0 | x^2+y^2=25
        \frac{x^2}{9}+\frac{y^2}{4}=1 | 4x^2+9y^2=36
        y = \frac{4}{5}x + 10 | 4x-5y=-50
        2x-y+3=0 | y=2x+3
        y - 1 = 2(x - 3) | y = 2x - 5
        x = 2+3 = 5 | 5
        x = 2+3 = 5 | x = 5
        a=b=c | a = b = c
    """,
    "more labels": r"""
        f(2)=5 | 5
        f'(3) = 7 | 7
        f^{-1}(x) = \frac{x-1}{2} | \frac{x-1}{2}
        P(X=2) = 0.5 | \frac12
        \theta=30^\circ | 30
        θ = π/3 | \frac{\pi}{3}
        (x,y)=(3,2) | (3, 2)
        m\angle{ABC} = 30^\circ | 30^\circ
        \text{Area}=5\text{ cm}^2 | 5
        \text{Answer: }5 | 5
        \text{The area is } 5 | 5
        Area = 5 | 5
        x_{10} = 5 | 5
        |AB| = 5 | 5
        \overline{AB} = 5 | 5
        [ABC] = 12 | 12
        \mathbf{A}=\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
        A^{-1} = \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
        x = 1, 3 | 3, 1
        x = 1 \text{ or } x = 3 | 1, 3
        x \in \mathbb{R} | (-\infty,\infty)
    """,
    "spellings of units": r"""
        5 in | 5\text{ inches}
        12\text{ in}^2 | 12\text{ square inches}
        12\text{ sq. in.} | 12\text{ in}^{2}
        12 cm^2 | 12\text{ square centimeters}
        12 \mathrm{~cm}^3 | 12\text{ cubic cm}
        25\text{ feet} | 25 ft
        60\text{ mi/hr} | 60\text{ mph}
        55 miles per hour | 55 mph
        3\text{ hrs} | 3\text{ hours}
        162\text{ min} | 162\text{ minutes}
        9 a.m. | 9\text{ AM}
        9:30 | 9:30\text{ p.m.}
        20\text{ degrees Celsius} | 20^\circ\text{C}
        28 pct | 28\%
        5 per cent | 5\%
        \$1,250.50 | 1250.5
        5\text{ dollars} | \$5.00
        \$\frac{1}{2} | 0.5
        5¢ | 5\text{ cents}
        1,000.99€ | 1000.99
        10weeks | 10
        3.5km | 3.5
        3s | 3
        7 sec | 7\text{ seconds}
        \frac{3}{4} in | \frac34
        12\sqrt{3} cm | 12\sqrt3
        (2+\sqrt3) cm | 2+\sqrt{3}
        3\text{ cm}, 5\text{ cm} | 3, 5
        8 apples | 8
    """,
    "degrees": r"""
        \cos 40^\circ | \cos(40^{\circ})
        \sin(90^{\circ}-x) | \cos(x)
        \tan 45° | 1
        \sin^2 20^\circ + \cos^2 20^\circ | 1
        180^\circ-2\alpha | 180-2\alpha
    """,
    "e and i": r"""
        2\mathrm{e} | 2e
        e^{\mathrm{i}\pi} | -1
        1+2i | i(2-i)
        \frac{5-12i}{13} | \frac{5}{13}-\frac{12}{13}i
        (1+i)^2 | 2i
        i\sqrt3 | \sqrt{3}i
        |3+4i| | 5
    """,
    "digits beside digits": r"""
        2^6 * 3^5 * 5^4 | 2^6 3^5 5^4
        2\log_2 3 | \log_2 9
        \log_{10} 100 | 2
        2^{10} 3 | 3072
        (3)(4) | 12
        2(3)(4) | 24
        \frac{6}{2}(2) | 6
    """,
    "other spellings": r"""
        11,\! 111,\! 111,\! 100 | 11111111100
        10,\!000\pi | 10,000\pi
        \{1 \pm \sqrt{2}\} | 1+\sqrt2, 1-\sqrt2
        \pm 1, \pm 2 | -2,-1,1,2
        (\pm 3, 0) | (3,0), (-3,0)
        \mathbf{\frac{1}{2}} | \frac12
        \bm{\sqrt{8}} | 2\sqrt2
        \mathbf{(1,2)} | (1,2)
        0.\overline{3} | \frac13
        -1.\overline{27} | -\frac{14}{11}
        0.\overline{3}\pi | \frac{\pi}{3}
        1e6 | 1000000
        -1.5e-3 | -0.0015
        \{\} | \varnothing
        ℝ | \mathbb R
        {1,2} ∪ {2,3} | \{1,2\} \cup \{2,3\}
        {2, 3, 5} | 5,3,2
        (11,7)or(7,11) | (7,11),\ (11,7)
        -1 + sqrt(3) | \sqrt{3} - 1
        sqrt(2 + sqrt(3)) | \sqrt{2+\sqrt{3}}
        cos(pi/3) | \frac12
        x^(1/2) | √x
        \frac{\sqrt3}2 | \frac{\sqrt{3}}{2}
        a\mod b | a \bmod b
        5 (\bmod 7) | 5 \pmod{7}
        v_{\text{max}} | v_{max}
        \(5\) | 5
    """,
    "more matrices": r"""
        \left[\begin{array}{cc}1 & 2 \\3 & 4\end{array}\right] | \begin{pmatrix}1&2\\3&4\end{pmatrix}
        \begin{pmatrix}1&2\\[4pt]3&4\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
        \begin{pmatrix}\frac12\\-\frac 34\end{pmatrix} | \begin{bmatrix}1/2\\-\dfrac{3}{4}\end{bmatrix}
        \frac12\begin{pmatrix}2&4\\6&8\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
        \begin{pmatrix} 1 \\ R \end{pmatrix} | \begin{pmatrix}1\\R+0\end{pmatrix}
        (\begin{matrix}1\\2\end{matrix}) | \begin{pmatrix}1\\2\end{pmatrix}
    """,
    "proofs": r"""
        \frac{1}{2004!} | \frac{2005}{2005!}
        1-\frac{1}{2^{100}} | \frac{2^{100}-1}{2^{100}}
        \sqrt{3+2\sqrt{2}} | 1+\sqrt2
        \cos\frac{\pi}{7}-\cos\frac{2\pi}{7}+\cos\frac{3\pi}{7} | \frac12
        \sin 2x | 2\sin x\cos x
        \sin x \cdot 2 | 2\sin x
        \frac{n!}{(n-2)!} | n(n-1)
    """,
    "ascii relations": r"""
        5 <= x | x \geq 5
        x < 3 | 3 > x
        x ≠ 3 | x \ne 3
        -2<=x<3 | -2 \leq x < 3
        3>x\ge-2 | -2 \leq x < 3""",
    "case of letters": r"""
        Mm | mM""",
    "chains of equations": r"""
        x=2y=6 | x=2y=6
        a=b=c | c=b=a""",
    "spellings of units, more": r"""
        5cm | 5
        5 | 5 cm
        20 mph | 20 miles per hour
        20\text{ mph} | 20 \text{ mi/h}
        5\text{ m/s} | 5 meters per second
        5\text{ m/s}^2 | 5
        3\frac{1}{2}\text{ hours} | 3.5
        12 sq. in. | 12\text{ in}^2
        12\text{ in}^2 | 12 square inches
        12\text{ square feet} | 12\text{ ft}^2
        12\text{ cm}^{2} | 12
        8 cm^3 | 8 cubic centimeters
        8\text{ cc} | 8\text{ cm}^3
        9\text{ a.m.} | 9 am
        9:30 \text{ a.m.} | 9:30 AM
        £5 | 5
        €5 | 5€
        \$5 | 5 dollars
        \$5.00 | \$5
        -\$5 | -5
        \$1,234.50 | 1234.5
        5¢ | 5 cents
        25\text{ ft} | 25 feet
        \frac{1}{2}cm | 0.5
        30 degrees | 30^\circ
        30^{\circ}\text{C} | 30
        5\,\mathrm{cm} | 5
        5\mathrm{~cm} | 5
        3\text{ apples} | 3
        24 people | 24
        10 minutes | 10\text{ min}
        5 hours | 5\text{ hr}""",
    "degrees inside a function": r"""
        \cos 60^\circ | \frac{1}{2}
        \tan 45^{\circ} | 1
        \sin(30^\circ) | 0.5
        90^\circ-x | 90^{\circ} - x""",
    "digits beside digits, more": r"""
        2^3 3^2 | 72
        2^6\cdot3^5 | 2^6 3^5
        \log_3 5 | \log_{3}{5}
        3\log_5 2 | \log_5 8
        \ln 8 | 3\ln 2
        \frac{\ln 8}{\ln 2} | 3""",
    "powers of ten": r"""
        2.5e3 | 2500
        1E-3 | 0.001
        3 \times 10^{-2} | 0.03""",
    "empty set and real numbers": r"""
        \emptyset | \varnothing
        ∅ | \emptyset
        \mathbb R | (-\infty,\infty)
        (-\infty, +\infty) | \mathbb{R}""",
    "equations": r"""
        x^2+y^2=1 | y^2+x^2-1=0""",
    "the imaginary unit": r"""
        2i+1 | 1+2i
        \frac{1}{i} | -i
        (2+i)(2-i) | 5
        i^2 | -1
        3i | 3 i
        \frac{1+i}{\sqrt{2}} | \frac{\sqrt2}{2}+\frac{\sqrt{2}}{2}i
        2\sqrt{3}i | 2i\sqrt3
        e^{i\pi} | -1""",
    "labels and equations": r"""
        y=2x+1 | y-2x=1
        y=2x+1 | 2x-y+1=0
        x=\frac{y}{2} | y=2x
        5=x | 5
        x=5 | 5=x
        f(x)=2x | 2x
        P(A)=\frac{1}{4} | 0.25
        \angle A=30^\circ | 30
        \angle ABC = 30^\circ | 30^\circ
        (x,y)=(3,2) | (3,2)
        (x, y) = (3, 2) | (3,2)
        a_n=2n | 2n
        S_{10}=55 | 55
        f^{-1}(x)=x-1 | x-1
        \text{Volume}=12 | 12
        \alpha = 3 | 3
        A\cup B=\{1,2\} | A\cup B=\{1,2\}
        \mathbf{v} = (1,2) | (1,2)
        \vec{v}=(1,2) | (1,2)
        x_1=3 | 3
        AB=5\text{ cm} | 5
        x=3, y=4 | y=4, x=3
        x = 3 \text{ or } x = 5 | 3, 5""",
    "indices": r"""
        k_{\mathrm{B}} T | k_B T""",
    "matrices in all brackets": r"""
        \begin{bmatrix}1&2\end{bmatrix} | \begin{pmatrix}1&2\end{pmatrix}
        \begin{pmatrix}\frac12\\[4pt]3\end{pmatrix} | \begin{pmatrix}1/2\\3\end{pmatrix}
        \begin{pmatrix}\dfrac{1}{2}&0.5\end{pmatrix} | \begin{pmatrix}1/2&\frac12\end{pmatrix}
        \left(\begin{array}{c}1\\2\end{array}\right) | \begin{pmatrix}1\\2\end{pmatrix}
        \begin{pmatrix}1\\2\\\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
        [\begin{smallmatrix}1\\2\end{smallmatrix}] | \begin{bmatrix}1\\2\end{bmatrix}
        \begin{pmatrix}-\tfrac13 & 2\\ 1 & 0\end{pmatrix} | \begin{pmatrix}-1/3&2\\1&0\end{pmatrix}
        \frac{1}{5}\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1/5\\2/5\end{pmatrix}
        -\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}-1\\-2\end{pmatrix}
        \mathbf{M} = \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}""",
    "mod": r"""
        1\mod 7 | 1\bmod 7
        3 \pmod 7 | 3\pmod{7}""",
    "or and and": r"""
        1and2 | 1,2
        x=1 or x=2 | 1, 2
        (1,2) or (3,4) | (1,2),(3,4)
        (1,2)\text{ and }(3,4) | (3,4),(1,2)""",
    "plain functions": r"""
        sqrt(8) | 2\sqrt2
        sqrt(2)/2 | \frac{1}{\sqrt 2}
        3*sqrt(5) | 3\sqrt5
        \sqrt(3) | \sqrt3
        √3 | \sqrt{3}
        √(3) | \sqrt3
        2π | 2\pi
        x^(1/2) | \sqrt{x}
        2^{-1} | \frac12
        2^-1 | 0.5""",
    "primes": r"""
        f'(x) = 3 | 3""",
    "repeating decimals": r"""
        0.\overline{142857} | \frac17
        0.1\overline{6} | 1/6
        0.\bar{3} | 1/3
        0.\dot{3} | \frac13
        1.2\overline{34} | \frac{611}{495}""",
    "roman and bold letters": r"""
        2\mathrm{i} | 2i
        \mathrm{e}^{2} | e^2
        \text{e} | e
        3\mathrm{e}^{x} | 3e^x""",
    "thousands": r"""
        111,\! 111 | 111111
        11,\!111 | 11111
        1{,}000{,}000 | 1000000
        1\,000\,000 | 1000000
        -1,234 | -1234""",
    "plus or minus in a list": r"""
        \pm 1, 3 | 1,-1,3
        \{\pm 1, 3\} | 1,-1,3
        \{\pm\sqrt2\} | \sqrt2,-\sqrt2
        1\pm\sqrt{3} | 1-\sqrt3,1+\sqrt3
        \frac{1\pm\sqrt5}{2} | \frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}
        x=\pm 2 | 2,-2""",
    "bold": r"""
        **\frac{1}{2}** | \frac12
        \boldsymbol{\frac{1}{2}} | 0.5
        \textbf{5} | 5
        \mathbf{3}\pi | 3\pi""",
    "braces and unions": r"""
        {1,2} | \{2,1\}
        {5} | 5
        [1,2]∪[3,4] | [1,2] \cup [3,4]
        \{1,2\}\cup\{3\} | \{3\}\cup\{1,2\}""",
    "more expressions": r"""
        \frac{10!}{8!} | 90
        \binom{5}{2} | 10
        \sqrt[3]{-8} | -2
        |{-3}| | 3
        \lfloor 3.7\rfloor | 3
        \sin^2 x+\cos^2 x | 1
        \sqrt{3+2\sqrt2} | 1+\sqrt{2}
        \frac{\sqrt{6}+\sqrt{2}}{4} | \cos 15^\circ
        \frac{x^2-1}{x-1} | x+1
        a^{2}b | b a^2
        (a-b)^2 | (b-a)^2
        \frac{a}{b}+\frac{b}{a} | \frac{a^2+b^2}{ab}
        h(a+b) | ha+hb
        \frac{h(b_1+b_2)}{2} | \frac12 h(b_1+b_2)
        n(n+1)/2 | \frac{n(n+1)}{2}
        \arctan 1 | \frac{\pi}{4}
        \sin^{-1}(1) | \frac\pi2
        \frac\pi2 | \frac{\pi}{2}
        4 \sin x \cos x | 2\sin 2x
        x\ln x | x \ln(x)
        -\frac{1}{2} | \frac{1}{-2}""",
    "ratios and percent": r"""
        3 : 2 | 3:2
        10\% | 10 percent
        10\% | 10""",
    "read in two ways": r"""
        8!! | 8!!""",
    "units once more": r"""
        25.5 miles | 25.5\text{ mi}
        15 sq units | 15\text{ square units}
        15\text{ units}^2 | 15
        15\text{ sq cm} | 15\text{ cm}^2
        60\text{ mph} | 60
        60 km/h | 60\text{ kilometers per hour}
        60\,\text{km/hr} | 60 km/h
        5\text{ lbs} | 5\text{ pounds}
        3 kg | 3\text{ kilograms}
        12" | 12"
        90^{\circ} | 90\text{ degrees}
        6 \text{ inches} | 6\text{ in.}
        4\frac{1}{2}\text{ feet} | 4.5\text{ ft}
        18 \text{ in}^3 | 18\text{ cubic inches}
        5 liters | 5 L
        5\text{L} | 5
        100 mL | 100\text{ ml}
        2 hours | 2\text{ hours}
        50 cents | 50
        0.50\text{ dollars} | \$0.50
        5 USD | \$5
        7:00 pm | 7:00\text{ p.m.}
        12.5 percent | 12.5\%
        \frac{1}{2}\% | 0.5\%
        5 years | 5\text{ yrs}
        3 days | 3
        \frac{68}{3} pounds | \frac{68}{3}\text{ pounds}
        65 tickets | 65
        10 units | 10
        5kg | 5
        5° | 5^\circ
        5\degree | 5""",
    "labels once more": r"""
        m\angle ABC=60^\circ | 60
        \measuredangle A = 30^\circ | 30
        \triangle ABC=6 | 6
        [ABC]=12 | 12
        |AB| = 5 | |AB|=5
        P(X > 2) = 0.3 | 0.3
        P(X=2)=0.25 | 1/4
        \lambda = 5 | 5
        x_{\text{max}}=5 | 5
        \text{The answer}=5 | 5
        \text{Area} = 12\text{ cm}^2 | 12
        Area = 12 | 12
        \overrightarrow{AB} = (1,2) | (1,2)
        g(x)=x^2 | x^2
        f(x,y)=xy | xy
        (f\circ g)(x)=x | (f\circ g)(x)=x
        f'(2)=12 | 12
        f''(x)=2 | 2
        y'=2x | 2x
        (a,b)=(1,2) | (1,2)
        (x_1,x_2)=(1,2) | (1,2)
        (a, b, c) = (1, 2, 3) | (a,b,c)=(1,2,3)
        A = \{1,2\} | \{1,2\}
        x\in\{1,2\} | 1,2
        x\in(-\infty,2] | (-\infty,2]
        \theta=\frac{\pi}{6} | \theta = \pi/6""",
    "equations of curves": r"""
        3x-2y=6 | y=\frac{3}{2}x-3
        y-2=3(x-1) | y=3x-1
        y=3x-1 | y - 2 = 3(x - 1)
        x^2+y^2-4x=0 | (x-2)^2+y^2=4
        \frac{x^2}{4}+\frac{y^2}{9}=1 | 9x^2+4y^2=36
        y=x^2 | x^2=y
        y = 2x | 2x-y=0
        10x-4y-5z-20=0 | 10x - 4y - 5z = 20""",
    "inequalities": r"""
        x>2 | 2<x
        2x>4 | x>2
        0 \le x \le 5 | 0\leq x\leq5
        x\leqslant 3 | x \le 3
        x\ne0 | x\neq 0
        a\bmod b | a \mod b""",
    "matrices once more": r"""
        [\begin{array}{cc}1&2\\3&4\end{array}] | \begin{bmatrix}1&2\\3&4\end{bmatrix}
        \begin{Bmatrix}1\\2\end{Bmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
        \begin{pmatrix} \frac{1}{2} & -\frac 12 \\[1ex] \sqrt{4} & 0 \end{pmatrix} | \begin{pmatrix}0.5&-0.5\\2&0\end{pmatrix}
        \left| \begin{array}{cc}1&2\\3&4\end{array}\right| | \begin{vmatrix}1&2\\3&4\end{vmatrix}
        \begin{pmatrix}1\\ \\2\end{pmatrix} | \begin{pmatrix}1\\ \\2\end{pmatrix}
        \begin{pmatrix}1 & 2\end{pmatrix} | \left(\begin{matrix}1&2\end{matrix}\right)
        (\begin{array}{c}-1\\\frac{3}{4}\end{array}) | \begin{pmatrix}-1\\3/4\end{pmatrix}""",
    "unions and or": r"""
        (7,11)or(11,7) | (7,11),(11,7)
        3or5 | 3, 5
        1, 2and 3 | 1,2,3
        (1,2),\ (3,4) | (1,2),(3,4)
        \{1, 2\}∪\{3\} | \{1,2\}\cup\{3\}
        (-\infty,0)∪(1,∞) | (-\infty,0)\cup(1,\infty)""",
    "decimals and roots in plain text": r"""
        -1 - sqrt(5)/2 | -1-\frac{\sqrt5}{2}
        2sqrt(3) | 2\sqrt3
        sqrt(x^2+1) | \sqrt{x^2+1}
        sqrt{3} | \sqrt3
        4\sqrt(2)+1 | 1+4\sqrt2
        sqrt3 | \sqrt3
        -.5 | -\frac12
        0.\overline{09} | \frac{1}{11}
        3.\overline{6} | \frac{11}{3}
        -0.\overline{3} | -\frac13
        0.(3) | 1/3""",
    "imaginary units and unit vectors": r"""
        \frac{5+12i}{13} | \frac{5}{13}+\frac{12}{13}i
        \frac{1}{2}+\frac{\sqrt{3}}{2}i | \frac{1+i\sqrt3}{2}
        \frac{1+\sqrt{3}i}{2} | \frac{1+i\sqrt3}{2}
        -i\sqrt{2} | -\sqrt2 i
        3\text{i} | 3i
        \pm 3i | 3i,-3i
        2e^{i\pi/3} | 1+\sqrt3 i
        i | \sqrt{-1}
        \mathbf{i}+2\mathbf{j} | 2\mathbf{j}+\mathbf{i}
        \text{e}^{x} | e^x
        \mathrm{e}^{-1} | \frac{1}{e}
        \operatorname{sin} x | \sin x
        \mathrm{d} | d""",
    "groups of digits": r"""
        1,\!000,\! 000 | 1000000
        1,\! 234.5 | 1234.5
        10,\!000\text{ dollars} | 10000""",
    "proofs, not digits": r"""
        2^{100} | 1267650600228229401496703205376
        \frac{2006!}{2004!} | 2006\cdot2005""",
    "angles": r"""
        \sin 20^\circ | \cos 70^\circ
        \cos 2x | 1-2\sin^2 x
        \sin(180^\circ - x) | \sin x
        45^\circ | 45""",
    "all the rest": r"""
        \{ 1,2 \} | {1, 2}
        (1,2] | \left(1,2\right]
        6! | 720
        x \cdot y | xy
        3\times5 | 15
        \frac{3x}{4} | \frac34 x
        0.75x | \frac{3x}{4}
        \frac{\sqrt{3}}{3} | \frac{1}{\sqrt3}
        a^{-1} | \frac1a
        x^{\frac12} | \sqrt x
        \log 100 | 2
        \log_{2}8 | 3
        \ln e^2 | 2
        e^{\ln 2} | 2
        \sqrt[4]{16} | 2
        2^{\frac{1}{3}} | \sqrt[3]{2}
        \left\lfloor \frac{7}{2} \right\rfloor | 3
        \dbinom{5}{2} | 10
        \binom{n}{2} | \frac{n(n-1)}{2}
        (2n)! | (2n)!
        n\cdot n! | n!\cdot n
        (n+1)! | (n+1)n!
        \vec{a}+\vec b | \vec{b}+\vec{a}
        \langle 1,2\rangle | \langle 1, 2 \rangle
        1:2 | 1 : 2
        \text{no solution} | \text{No solution}
        \infty | +\infty
        f(1)<f(2) | f(2)>f(1)""",
    "intervals and inequalities": r"""
        [-2,0] | -2 \le x \le 0
        -2 \le x \le 0 | [-2,0]
        [-2,0) | -2 \le x < 0
        (-2,0] | 0 \ge x > -2
        -2 \le t \le 0 | [-2,0]
        -\frac12 < \theta < \sqrt{8} | (-0.5, 2\sqrt{2})
        x > 2 | (2,\infty)
        (-\infty,3] | x \le 3
        -2 \le x \le 7 | x \in [-2,7]
        x<1 \text{ or } x>3 | (-\infty,1)\cup(3,\infty)""",
    "repeating decimals, seen": r"""
        0.333... | \frac{1}{3}
        0.333\ldots | 1/3
        -1.1666… | -\frac76
        .333\dots | \frac13
        0.1212... | \frac{4}{33}
        0.999... | 1
        0.142857142857... | \frac17""",
    "words for a base": r"""
        1011_{\text{two}} | 1011_2
        1011_2 | 1011_{\text{two}}
        1011_{two} | 1011_{2}
        27_\text{sixteen} | 27_{16}""",
}
DIFFERENT = {
    "size": r"""
        2^{3^\circ} | 8
        500 | 5
        0.05 | 5
        5 | 0.05
        0.05 | 5\%
        500\% | 5
    """,
    "products of letters": r"""
        \pi r^2h | \pi r^2
        \pi r^2 h | \pi r^2
        2ab | 2
        n^2m | n^2
        x^2+2xm | x^2+2x
        5x+3m | 5x+3
        2t | 2
        X+1 | x+1
        2**3 | 23
    """,
    "equations": r"""
        1=5 | 5
        2x=5 | 5
        x+y=5 | 5
        5 | x+y=5
        100=100=5 | 5
        2 \approx 6 | 2
        5 \approx 6 | 6
    """,
    "white space": r"""
        3 1/2 | 31/2
        31/2 | 3 1/2
        2 3/4 | 23/4
        1 2 | 12
        1, 234 | 1,234
    """,
    "words that are no units": r"""
        5 million | 5
        5\text{ million} | 5
        5 squared | 5
        5 factorial | 5
        5 minus x | 5
        5 is not right | 5
        5\text{ is not the answer, 6 is} | 5
        12\text{ base 7} | 12
        3 dozen | 3
        2 sin x | 2
    """,
    "rounded": r"""
        0.3333 | \frac13
        0.33333333333333333333 | 1/3
        1.41421356237309504880 | \sqrt{2}
        3.14159265358979323846 | \pi
        5.0001 | 5
        4.9995 | 5
        \sqrt{2}+10^{-20} | \sqrt{2}
    """,
    "brackets": r"""
        (1,2) | [1,2]
        (1,2] | (1,2)
        [0,1) | (0,1]
        (1,2) | \{1,2\}
    """,
    "lists and tuples": r"""
        1,2 | 12
        12 | 1,2
        (2,1) | (1,2)
        1,2 | 1,2,3
        1,2,3 | 1,2
        1,1,2 | 1,2,2
        (1,2),(3,4) | (1,2),(4,3)
        3 | 3,4
        2 | \pm 2
    """,
    "matrices": r"""
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix}
        \begin{pmatrix}1&2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
        \begin{vmatrix}1&2\\3&4\end{vmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
    """,
    "bases and times": r"""
        52_7 | 52_8
        52 | 52_7
        5:30 | 5:03
    """,
    "letters, words, units, labels": r"""
        B | A
        (B) | \text{(A)}
        x | y
        \text{Tuesday} | \text{Monday}
        5 m | 5 cm
        x=5 | y=5
        \text{no} | 5
    """,
    "expressions": r"""
        x+1 | x+2
        (x+1)^2 | x^2+1
        -\sqrt{2} | \sqrt{2}
        \frac{\pi}{3} | \frac{\pi}{4}
        x^2 | x
        1.5 | 1\frac{1}{3}
    """,
    "nothing": r"""
        \text{} | 5
        ? | 5
        \frac{}{} | 1
        , | 1,2
    """,
    "case of letters": r"""
        R-r | r-R
        \frac{m-M}{m+M}g | \frac{M-m}{M+m}g
        a\sin A | A\sin a
        \binom{N}{n} | \binom{n}{N}
        2\Delta | 2\delta
        \Phi | \phi
        \gamma | \Gamma
        V_A | V_a
        I | i
        pq | PQ
    """,
    "tiny": r"""
        \frac{1}{2006!} | \frac{1}{2004!}
        1-\frac{1}{2^{2010}} | 1-\frac{1}{2^{2009}}
        1-1 | \frac{1}{2004!}
        \sqrt2+\frac{1}{10^{80}} | \sqrt2
        \pi^{100}+10^{-50} | \pi^{100}
        \sqrt{10^{200}+1} | 10^{100}
        \sin 10^{-40} | 10^{-40}
        e^{-500} | 0
        x+10^{-80} | x
    """,
    "relations": r"""
        x^2+4=0 | x^2+9=0
        x^2+y^2+9=0 | x^2+y^2+4=0
        e^x+1=0 | e^x+2=0
        |x|=-1 | |x|=-2
        0=1 | 1=2
        x=x | y=y
        a=2b=c | a=b=c
        x=7=9=5 | x=2+3=5
        x=7=5 | 5
        a=b=c | a=b
        x>5 | x \geq 5
        x>5 | x<5
        -x<3 | x<-3
        y=2x+3 | x=2y+3
        x \neq 3 | x = 3
        \sqrt{x}=5 | 5
        x(x-1)=6 | 6
        x \to 5 | 5
    """,
    "words behind a number": r"""
        3\text{ to 2} | 3
        12 to 15 | 12
        3 remainder 2 | 3
        5 trillion | 5
        2 xy | 2
        3 fifths | 3
        3 quarters | 3
        5 negative | 5
        2 cdot x | 2
        5\text{ or more} | 5
        5\text{-1} | 5
        3\text{ divided by 5} | 3
        3\text{ hours 20 minutes} | 3
        3\text{ feet }4\text{ inches} | 3
        3 ft 4 in | 3
        6\text{K} | 6
    """,
    "units exchanged": r"""
        5\text{ cents} | \$5
        \$5 | 5\text{ cents}
        \$5 | 5\text{ km}
        \$5 | 5\%
        \$5 | €5
        5\text{ cm}^2 | 5\text{ cm}^3
        5\text{ square feet} | 5\text{ feet}
        9\text{ a.m.} | 9\text{ p.m.}
        60\text{ mph} | 60\text{ km/h}
        20^\circ\text{C} | 20^\circ\text{F}
        5 apples | 5 oranges
        9\$00 | 900
    """,
    "letters are no units": r"""
        2\mathrm{e} | 2
        3+2\mathrm{i} | 5
        5\mathbf{i} | 5
        2\text{x} | 2
        2\mathbf{v} | 2
        2 | 2m
        2\sqrt{3}s | 2\sqrt{3}
        -\frac52h | -\frac52
        2hr^2 | 2
    """,
    "primes, subscripts, degrees, accents": r"""
        f'(x) | f(x)
        2x' | 2x
        x^\prime | x
        x_1 | x_2
        10^{20}_1 | 10^{20}
        \sin 20^\circ | \sin 20
        \tan x^\circ | \tan x
        \log_2 3 | \log_3 2
        \log 2 | \ln 2
        \hat{x} | x
        \overline{AB} | AB
        x^* | x
    """,
    "what a parser may misread": r"""
        (3)(4) | 7
        3(4) | 7
        2 3 | 6
        2e^0 | 3
        \frac{6}{2}\frac{1}{2} | 3.5
        \sin x \cdot 2 | \sin 2x
        \frac{dy}{dx} | \frac{y}{x}
        f(2x) | 2f(x)
        f(x+1) | f(x)+f(1)
        0.333... | 0.333
        x-\infty | -\infty
        23. 31 | 23.31
        \cancel{5}6 | 56
        \det A | A
        A \cap B | AB
        5!! | 120
    """,
    "other spellings": r"""
        0.\overline{3} | 0.33
        1e6 | 10^5
        2e3 | 2e^3
        \{1\pm\sqrt2\} | 1+\sqrt2
        \emptyset | \{0\}
        \mathbb{R} | \mathbb{Z}
        \mathbb{R}\setminus\{0\} | \mathbb{R}
        5 \pmod 7 | 5 \pmod 8
        5 \pmod 7 | 5
        2\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
        2\begin{vmatrix}1&2\\3&4\end{vmatrix} | \begin{vmatrix}2&4\\6&8\end{vmatrix}
        \begin{pmatrix}1\\x\end{pmatrix} | \begin{pmatrix}1\\X\end{pmatrix}
        \begin{pmatrix}1\\R\end{pmatrix} | \begin{pmatrix}1\\r\end{pmatrix}
        (x,y)=(3,2) | (y,x)=(3,2)
        f(2)=5 | f(3)=5
        \text{no} | \text{on}
    """,
    "ascii relations": r"""
        x > 5 | x >= 5
        x<5 | x>5
        x=3 | x != 3""",
    "case of letters, more": r"""
        \frac{R}{r} | \frac{r}{R}
        \theta | \Theta
        \sigma | \Sigma
        Mm | mM^2
        R^2-r^2 | r^2-R^2
        \Gamma | \gamma
        \Omega | \omega
        A a | a^2""",
    "chains of equations": r"""
        x=2y=6 | x=2y=7
        x=1=5 | 5""",
    "spellings of units": r"""
        12\text{ in} | 12\text{ in}^2
        12\text{ cm} | 12\text{ in}
        5\text{ cents} | 5\text{ dollars}
        5¢ | \$5""",
    "degrees inside a function": r"""
        \cos 60^\circ | \cos 60
        \sin x^\circ | \sin x""",
    "digits beside digits": r"""
        3 5 | 15
        3 5 | 35""",
    "empty set and real numbers": r"""
        \mathbb{Z} | \mathbb{R}
        \emptyset | 0""",
    "equations without solutions": r"""
        x^2+1=0 | x^2+2=0
        1=2 | 3=4
        \sin x=2 | \sin x=3""",
    "the imaginary unit": r"""
        2i | 2
        -i | i""",
    "labels and equations": r"""
        y=2x+1 | y=2x+2
        y=2x | x=2y
        y=5 | x=5
        x^2=5 | 5
        xy=5 | 5
        x+1=5 | 5
        |x|+1=5 | 5""",
    "indices": r"""
        k_A | k_B
        x_1 | x""",
    "matrices in all brackets": r"""
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | 10""",
    "mod": r"""
        3 \pmod 7 | 3 \pmod 5
        3 \pmod 7 | 3""",
    "primes": r"""
        f'(x) | f''(x)
        f''(2) | f(2)
        y' | y
        x' | x""",
    "repeating decimals": r"""
        0.\overline{3} | 0.3""",
    "roman and bold letters": r"""
        2\mathrm{i} | 2
        2\mathrm{x} | 2
        2\text{ e} | 2
        2\mathbf{m} | 2
        2\boldsymbol{x} | 2""",
    "subscripts behind brackets": r"""
        (3)_2 | 3
        10^{2}_3 | 10^2""",
    "words behind a number, more": r"""
        3 to 2 | 3
        3\text{ to }2 | 3
        3\text{ R }2 | 3
        5 thousand | 5
        5 hundredths | 5
        3 halves | 3
        2\text{ times }x | 2
        0 to 5 | 0
        5 more | 5
        5 less | 5
        3 feet 4 inches | 3
        5 times 2 | 5
        5 minus 1 | 5
        5!m | 5""",
    "tiny differences": r"""
        \frac{1}{100!} | \frac{1}{101!}
        2^{-1000} | 2^{-1001}
        1-10^{-70} | 1
        \sqrt{2}+2^{-500} | \sqrt{2}
        e^{-1000} | e^{-1001}
        e^{-500}+1 | 1
        \cos(10^{-50}) | 1
        x+10^{-90} | x""",
    "ratios and percent": r"""
        10\% | 0.1""",
    "read in two ways": r"""
        1/2x | \frac{1}{2x}
        abc | abd
        8!! | 8!""",
    "units once more": r"""
        5\text{ kg} | 5\text{ g}
        5 hours | 5 minutes
        5 dollars | 5 cents
        5\% | \$5
        5\text{ seconds} | 5\text{ hours}
        5 km/h | 5 m/s
        5^\circ | 5\%
        2\text{ and }3 | 2
        4\text{ or }5 | 4
        5\text{ plus }3 | 5
        7 fourths | 7
        5\text{ factorial} | 5
        5\text{ choose }2 | 5
        2\text{ mod }5 | 2
        5\text{ percent less} | 5
        6\text{ to the }2 | 6
        6 of 10 | 6
        6 out of 10 | 6
        4\text{ with probability }1/2 | 4
        3 point 5 | 3
        8 over 3 | 8
        8 divided by 3 | 8
        5 billion | 5
        2 sqrt 3 | 2
        5 approx | 5
        5 x 10 | 5
        5 e | 5
        5 i | 5
        5 pi | 5
        \text{about }5 | 6
        5\text{ i} | 5
        5\text{n} | 5
        5\mathrm{n} | 5
        2\text{k} | 2
        x\text{ cm} | x^2""",
    "labels once more": r"""
        \theta=\frac{\pi}{6} | \phi=\frac{\pi}{6}
        A=5 | a=5
        3x=5 | 5/3
        (2x,y)=(1,2) | (1,2)
        \frac{x}{2}=5 | 5
        x^2=4 | 4
        -x=5 | 5
        5=5 | 6""",
    "equations of curves": r"""
        y=2x+1 | 2x+1=0
        x^2+y^2=4 | x^2+y^2=2
        y=x | y=x^2
        xy=1 | xy=2
        x^2+4=0 | x^2=4
        \sqrt{x}=-1 | \sqrt{x}=-2""",
    "inequalities": r"""
        -x>2 | x>2
        x\le 3 | x<3""",
    "matrices once more": r"""
        \begin{pmatrix}1&2\end{pmatrix} | (1,2)""",
    "imaginary units and unit vectors": r"""
        3+2i | 3-2i
        5\mathbf{j} | 5
        \mathbf{i}+2\mathbf{j} | \mathbf{j}+2\mathbf{i}""",
    "subscripts": r"""
        10^{20}_{1} | 10^{20}
        (x)_1 | x
        x^2_1 | x^2
        (1+2)_3 | 3""",
    "proofs, not digits": r"""
        2^{-100}+1 | 1+2^{-101}
        10^{-40} | 0
        \frac{1}{10^{100}} | \frac{1}{10^{101}}
        e^{-200} | 0
        \sqrt{10^{40}+1} | 10^{20}
        (1+10^{-50})^2 | 1
        0.99999999999999999999999999999999999999999999999999999999999999999999999999 | 1
        \pi+10^{-65} | \pi
        \tanh(200) | 1
        \arctan(10^{70}) | \frac{\pi}{2}
        x^{100}+10^{-70}x | x^{100}
        2^{100}+1 | 2^{100}""",
    "angles": r"""
        \sin 20^\circ | \cos 20^\circ
        \tan 45^\circ | \tan 45""",
    "all the rest": r"""
        \vec a | \vec b
        \infty | -\infty
        f(1)<f(2) | f(2)<f(1)""",
    "intervals and inequalities": r"""
        [-2,0) | -2 \le x \le 0
        (-2,0] | -2 \le x < 0
        [-2,0] | -2 < x < 0
        [0,-2] | -2 \le x \le 0
        -2 \le x \le 0 | -2 \le y \le 0
        -2 \le y \le 7 | x \in [-2,7]
        -2 \le x+1 \le 0 | [-2,0]
        -2 < f(x) < 0 | (-2,0)
        -2 < x < 0 < 1 | (-2,0)
        x > 2 | [2,\infty)
        x > 2 | (2,3)
        x < 3 | (3,\infty)
        2 < 3 | (2,\infty)
        x<1 \text{ and } x>3 | (-\infty,1)\cup(3,\infty)""",
    "decimals that may go on otherwise": r"""
        0.33... | \frac13
        0.3334... | \frac13
        0.333 | \frac13
        0.333... | 0.333
        3.14159... | \pi
        1.4142... | \sqrt2
        1,333.333... | \frac43""",
    "words for a base": r"""
        1011_{\text{three}} | 1011_2
        1011_{\text{two}} | 1011
        1011_{\text{two}} | 1101_2""",
}
HOSTILE = [
    "9^{9^{9^{9^{9}}}}", "((((((1000!)!)!)!)!)!)", "(" * 180 + "1" + ")" * 180, "(" * 10_000, "9" * 100_000, "9" * 390, r"\frac{" * 60 + "1",
    r"\frac{1}{" * 40 + "1" + "}" * 40, "{" * 150 + "5" + "}" * 150, "٥", "5\x00", "\u202e5", r"\input{/etc/passwd}",
    "__import__('os').system('touch pwned')", "inf", "nan", "-inf", r"\infty", "1e400", r"\int_0^{\infty} e^{x^{x^x}} dx", r"\sum_{n=1}^{10^{12}} n!",
    r"\sqrt[10^{10}]{10^{10^{10}}}", "2^{3^{4^{5^{6}}}}", "x" * 350, "1,".join([""] * 190), r"\pm" * 120, "𝟓", "5" + "'" * 300, r"\begin{pmatrix}" * 20,
    "1/0", r"\frac{1}{0}", "0^{-1}", "\\", "\\" * 300, "}{", "=", "==5==", "5 = 5 = 5 = 5 = 6", r"\text{" * 60, "-" * 300 + "5", "lambda: 5", "exit()",
]  # fmt: skip


def cases(table):
    lines = [(kind, line.strip()) for kind, block in table.items() for line in block.strip().splitlines()]
    return [pytest.param(*line.rsplit(" | ", 1), id=f"{kind}: {line}") for kind, line in lines]


@pytest.fixture(scope="module")
def one_grader():
    one = grader.Grader(workers=1, timeout=1.5)
    yield one
    one.close()


@pytest.mark.parametrize("answer,gold", cases(SAME))
def test_the_same_answer_written_otherwise(one_grader, answer, gold):
    assert one_grader.grade([f"So it is $\\boxed{{{answer}}}$."], [gold]) == [True]


@pytest.mark.parametrize("answer,gold", cases(DIFFERENT))
def test_another_answer(one_grader, answer, gold):
    assert one_grader.grade([f"So it is $\\boxed{{{answer}}}$."], [gold]) == [False]


@pytest.mark.parametrize(
    "text,answer",
    [
        (r"first \boxed{1}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{ 5. }", "5."),
        (r"\boxed {7}", "7"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        ("2+2=4\n#### 1,234", "1,234"),
        ("#### 5\nmore\n#### 6", "6"),
        ("#### 72\n\n", "72"),
        ("The answer is 5.", "5"),
        ("the final answer is: $x = 2.5$. Done.", "$x = 2.5$"),
        (r"#### 5, that is \boxed{6}", "6"),
        (r"\boxed{1} and then \boxed{", None),
        (r"\boxed{1} and then \boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed", None),
        ("####", None),
        ("# Answer\n42", "42"),
        ("## Final Answer:\n\n$x=5$\nas was to be found", "$x=5$"),
        ("### Answer\nThe answer is 5.", "5"),
        ("#### **Answer:** 5", "5"),
        ("# Answer\n", None),
        ("# Answers are hard\n5", None),
        (r"so it is $\boxed 7$.", "7"),
        (r"\boxed12", "12"),
        (r"\fbox{7}", "7"),
        (r"$x$ is \boxed{-1} and \boxed{2}.", "-1, 2"),
        (r"\boxed{1}$, $\boxed{2}$, and $\boxed{3}", "1, 2, 3"),
        (r"\(\boxed{a}\)\text{ or }\(\boxed{b}\)", "a, b"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"first \boxed{1} and then also \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{}", None),
        (r"<think>\boxed{5}</think>The answer is 6", "6"),
        (r"it may be \boxed{5}</think> so #### 6", "6"),
        (r"\boxed{6}<think>no, \boxed{5}", "6"),
        (r"<think>\boxed{5}", None),
        ("So it is 34.\nAnswer: 34", "34"),
        ("**Answer:** 34\n", "34"),
        ("**Answer: 34.**", "34."),
        ("> Final Answer: $x=5$", "$x=5$"),
        ("Answer:\n34", "34"),
        ("Answer: 34. I am sure.", "34"),
        ("Final Answer: The final answer is $34$. I hope it is correct.", "$34$"),
        ("We might say that the answer is 5. No.\nAnswer: 6", "6"),
        ("Answer: see below", "see below"),
        (r"Answer: see below" "\n" r"So it is \boxed{5}.", "5"),
        ("Answer: see below\n#### 5", "5"),
        ("Answer: 3, at first.\nBut no, the answer is 5.", "5"),
        ("Answer: 34\nThat was easy.", None),
        ("My answer: 34", None),
        ("Answer:", None),
        ("**The answer is 42.**", "42."),
        ("**The answer is 42.** I am sure.", "42"),
        ("The answer is **42.** I am sure.", "42"),
        ("*The final answer is $42$*", "$42$"),
        ("The answer is 2**3", "2**3"),
        ("no answer", None),
        ("", None),
    ],
)
def test_the_final_answer_of_a_text(text, answer):
    assert grading.extract_answer(text) == answer


@pytest.mark.parametrize(
    "text,gold",
    [
        (r"It is 5, we might think \boxed{5}, but it is \boxed{6}", "5"),
        ("5 eggs.\n#### 6", "5"),
        (r"The answer is 5, so \boxed{}", "5"),
        (r"\boxed{5", "5"),
        ("5", "5"),
    ],
)
def test_a_gold_answer_elsewhere_in_the_text_does_not_count(text, gold):
    assert not grading.is_correct(text, gold)


def test_is_correct_is_the_same_grader():
    assert grading.is_correct("18 dollars a day.\n#### 1,080", "1080")
    assert grading.is_correct(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda a: ascii(a[:30]))
def test_hostile_answers_are_wrong(one_grader, answer):
    """Each of them: what hangs is given up, what would be executed is not, what kills its worker
    does not kill ours.
    """
    assert one_grader.grade([f"#### {answer}", f"\\boxed{{{answer}}}"], ["7", r"\sqrt{7}"]) == [False, False]
    assert not os.path.exists("pwned")


def test_a_hostile_answer_does_not_hold_up_the_others():
    both = grader.Grader(workers=2, timeout=4.0)  # of CPU time, which only the hostile one uses up
    both.grade([r"\boxed{\sqrt{8}}"] * 2, [r"\sqrt{2}", r"\sqrt{3}"])  # the workers are up
    texts = [r"\boxed{9^{9^{9^{9^{9}}}}}"] + [rf"\boxed{{\sqrt{{{n}}}+x}}" for n in range(2, 32)]
    golds = [r"\sqrt{2}"] + [rf"x+\sqrt{{{n}}}" for n in range(2, 32)]
    pairs = both._start(texts, golds)
    others = [both._started[pair] for pair in pairs[1:]]
    assert (
        all(other.result() for other in others) and not both._started[pairs[0]].done()
    )  # while that one still hangs
    assert both.grade(texts, golds) == [False] + [True] * 30
    assert both.counts["timed_out"] == 1
    both.close()


def test_many_hostile_parts_share_one_time_limit():
    g, given, ask = grader.Grader(workers=1, timeout=1.0), [], Workers.ask

    def ask_and_note(answer, gold, seconds):
        reply, took = ask(g._workers, answer, gold, seconds)
        given.append((seconds, took))
        return reply, took

    g._workers.ask = ask_and_note
    tower = "9^{9^{9^{9^{9}}}}"
    assert g.grade(
        [rf"\boxed{{{tower},{tower}+1,{tower}+2,{tower}+3}}"], [r"\sqrt2,\sqrt3,\sqrt5,\sqrt7"]
    ) == [False]
    assert given[0][0] == 1.0
    for (seconds, took), (later, _) in zip(given, given[1:]):
        assert later == pytest.approx(seconds - took)
    g.close()


@pytest.fixture
def busy_machine():
    """A function that starts ten busy processes for each core, each in a session of its own: the kernel
    shares the CPU by session.
    """
    busy = []
    command = ["sh", "-c", "while :; do :; done"]
    yield lambda: busy.extend(
        subprocess.Popen(command, start_new_session=True) for _ in range(10 * os.cpu_count())
    )
    for process in busy:
        process.kill()
        process.wait()


def test_the_verdict_does_not_depend_on_how_busy_the_machine_is(busy_machine):
    """A proof that takes a third of a second of CPU time, several times the limit by the clock; an
    answer that never ends is given up there as well.
    """
    patient, hasty = grader.Grader(timeout=2.0), grader.Grader(timeout=0.2)
    busy_machine()
    expanded = r"\sin x\cos y\cos z+\cos x\sin y\cos z+\cos x\cos y\sin z-\sin x\sin y\sin z"
    answers = [r"\boxed{\sin(x+y+z)}", r"\boxed{(x+1)^2}", r"\boxed{\sqrt{8}}", r"\boxed{\sqrt{8}}"]
    golds = [expanded, "x^2+2x+1", r"2\sqrt{2}", r"2\sqrt{3}"]
    assert patient.grade(answers, golds) == [True, True, True, False]
    assert patient.counts["timed_out"] == 0
    assert hasty.grade([r"\boxed{9^{9^{9^{9^{9}}}}}"], [r"\sqrt{2}"]) == [False]
    assert hasty.counts["timed_out"] == 1 and not hasty.cache
    patient.close()
    hasty.close()


def test_a_worker_that_sleeps_is_given_up_in_the_end(monkeypatch, tmp_path):
    """It takes no CPU time, so the wall clock has to end it, far behind."""
    (tmp_path / "math_verify").mkdir()
    (tmp_path / "math_verify" / "__init__.py").write_text("")
    (tmp_path / "math_verify" / "parser.py").write_text(
        "import time\ndef latex2sympy(text, **options):\n    time.sleep(100)"
    )
    copy = tmp_path / "grading"
    shutil.copytree(Path(symbolic.__file__).parent, copy)
    text = (copy / "symbolic.py").read_text()
    impatient = text.replace("FAR, FAR_PER_SECOND = 30, 30", "FAR, FAR_PER_SECOND = 1, 0")
    assert symbolic.FAR >= 30 and impatient != text
    (copy / "symbolic.py").write_text(impatient)
    monkeypatch.setattr(symbolic, "__file__", str(copy / "symbolic.py"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    g = grader.Grader(timeout=0.5)
    assert g.grade([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"]) == [False]
    assert g.counts["timed_out"] == 1 and not g.cache
    g.close()


def test_a_worker_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="worker did not start"):
        grader.Grader()


def test_counts_and_the_cache():
    g = grader.Grader(workers=1)
    assert g.grade(["#### 5", "#### 5", "#### 6", "none"], ["5", "5", "5", "5"]) == [True, True, False, False]
    assert g.counts == dict(graded=2, cached=1, timed_out=0, no_answer=1)
    g.grade(["#### 5"], ["5"])
    assert g.counts["cached"] == 2
    with pytest.raises(ValueError):
        g.grade(["#### 5"], [])
    g.close()


def test_works_from_threads():
    g, results = grader.Grader(workers=2), []
    threads = [
        threading.Thread(
            target=lambda n=n: results.append(g.grade([rf"\boxed{{\sqrt{{{n * n * 2}}}}}"], [rf"{n}\sqrt2"]))
        )
        for n in range(2, 8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [[True]] * 6
    g.close()


def workers_of(tag):
    """Process ids whose environment carries the tag."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if (
                tag.encode() in open(f"/proc/{pid}/environ", "rb").read()
                and b"grading.symbolic" in open(f"/proc/{pid}/cmdline", "rb").read()
            ):
                found.append(int(pid))
        except OSError:
            pass
    return found


SCRIPT = """
import os, sys, grader
g = grader.Grader(workers=2)
print(g.grade([r"\\\\boxed{\\\\sqrt{8}}", "#### 5"], [r"2\\\\sqrt{2}", "5"]), flush=True)
if sys.argv[1] == "wait":
    import time; time.sleep(60)
"""


@pytest.mark.parametrize("ending", ["ends", "killed"])
def test_no_worker_outlives_its_program(tmp_path, ending):
    tag = f"GRADER_TEST={tmp_path}"
    script = tmp_path / "use_it.py"
    script.write_text(SCRIPT.replace("\\\\", "\\"))
    environment = os.environ | {"GRADER_TEST": str(tmp_path), "PYTHONPATH": str(ROOT)}
    program = subprocess.Popen(
        [sys.executable, script, "wait" if ending == "killed" else "end"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout.readline() == "[True, True]\n"
    if ending == "killed":
        assert workers_of(tag)
        program.send_signal(signal.SIGKILL)
    program.wait()
    deadline = time.time() + 5
    while workers_of(tag) and time.time() < deadline:
        time.sleep(0.1)
    assert not workers_of(tag)


def test_works_under_torchrun(tmp_path):
    script = tmp_path / "use_it.py"
    script.write_text(SCRIPT.replace("\\\\", "\\"))
    done = torchrun(2, script, "end")
    assert done.returncode == 0 and done.stdout.count("[True, True]") == 2, done.stderr


def test_math_gold_answers_equal_themselves_and_not_the_next(shared_data):
    golds = sorted(
        {
            json.loads(line)["answer"]
            for line in (shared_data / "math" / "train.jsonl").read_text().splitlines()
        }
    )
    g = grader.Grader(workers=2)
    assert all(g.grade([f"\\boxed{{{gold}}}" for gold in golds], golds))
    spaced = [gold.replace("+", " + ").replace("\\frac", "\\dfrac").replace(",", ", ") for gold in golds]
    assert all(
        g.grade(
            [f"\\boxed{{{answer}.}}" for answer in spaced if ", \\!" not in answer],
            [a for a, s in zip(golds, spaced) if ", \\!" not in s],
        )
    )
    wrong = g.grade([f"\\boxed{{{gold}}}" for gold in golds], golds[1:] + golds[:1])
    accepted = [(a, b) for a, b, w in zip(golds, golds[1:] + golds[:1], wrong) if w]
    assert all(answers._number(answers._normal(a)) is not None for a, _ in accepted), (
        accepted
    )  # 0.5 beside \frac12 are equal
    assert g.counts["timed_out"] == 0
    g.close()


def numbers_of(text):
    """The numbers in an answer, by other means than the grader's: Python computes them, with numbers
    for the letters. ValueError if it does not look like numbers.
    """
    text = re.sub(r"\\\\|\\(begin|end) *\{[pb]?matrix\}|[&\[\]]|\\cup", ",", text)
    text = re.sub(r"\\(left|right|!|\$| )|\$|\\text ?\{[^{}]*\}|\^ *(\{ *)?\\circ *\}?|\\?%", "", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = text.replace("\\infty", "999983").replace("\\pi", "p")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\(frac|sqrt) *(\w)", r"\\\1{\2}", text)
    text = re.sub(r"(\\frac *\{(?:[^{}]|\{[^{}]*\})*\}) *(\w)", r"\1{\2}", text)
    for _ in range(3):
        text = re.sub(r"\\frac *\{([^{}]*)\} *\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt *\{([^{}]*)\}", r"((\1)**0.5)", text)
    text = re.sub(r"\^ *\{([^{}]*)\}", r"**(\1)", text).replace("^", "**")
    if not re.fullmatch(r"[\d\sa-zA-Z+\-*/().,{}]*", text):
        raise ValueError(f"no numbers: {text}")
    text = re.sub(r"(?<=[\da-zA-Z)]) *(?=[a-zA-Z(])|(?<=[a-zA-Z)]) *(?=\d)", "*", text)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", re.sub(r"[{}]", "", text))
    values = {letter: 1.0 + 0.0371 * i for i, letter in enumerate(string.ascii_letters)}
    values |= {"p": math.pi, "i": 1j, "e": math.e}
    numbers = []
    for part in text.split(","):
        part = part.strip(" *")
        if part.count("(") > part.count(")"):  # the bracket of a tuple
            part = part.replace("(", "", 1)
        elif part.count("(") < part.count(")"):
            part = part[::-1].replace(")", "", 1)[::-1]
        numbers += [eval(part.strip(" *"), {"__builtins__": {}}, values)] if part else []
    return numbers


def test_mutated_gold_answers_are_accepted_only_where_they_are_equal(shared_data):
    """One token of a MATH gold answer replaced, added or left out. What is accepted is either the same
    but for white space and size, or has the same numbers.
    """
    lines = (shared_data / "math" / "test.jsonl").read_text().splitlines()
    token = re.compile(r"\\[a-zA-Z]+|\\.|.")
    golds = [gold for gold in (json.loads(line)["answer"] for line in lines) if "=" not in gold]
    tokens = sorted({t for gold in golds for t in token.findall(gold)})
    draw, pairs = random.Random(7), []
    for gold in golds:
        for _ in range(4):
            parts = token.findall(gold)
            i, new = draw.randrange(len(parts)), draw.choice(tokens)
            parts[i : i + draw.choice([0, 1, 1])] = draw.choice([[new], []])
            pairs.append((grading.extract_answer(f"\\boxed{{{''.join(parts)}}}") or "", gold))
    g = grader.Grader()
    right = g.grade([f"\\boxed{{{answer}}}" for answer, _ in pairs], [gold for _, gold in pairs])
    g.close()
    accepted = [(a, b) for (a, b), r in zip(pairs, right) if r and bare(a) != bare(b)]
    assert len(accepted) > 10
    for a, b in accepted:
        x, y = numbers_of(a), numbers_of(b)
        assert len(x) == len(y) and all(abs(p - q) < 1e-9 * (1 + abs(p)) for p, q in zip(x, y)), (a, b)


def bare(text):
    """Without white space and sizes, and without braces around it all."""
    return re.sub(r"^(?:\\text)?\{(.*)\}$", r"\1", re.sub(r"\s|\\(left|right|!|\s)", "", text))
