"""Token ids as text, for servers that take no token ids: a word an id, of words that are one token each.

The words are so common that the vocabularies of nearly all models hold each of them whole, with a space before it. So a
prompt of n ids is one of n tokens, beside what the server puts before it; the server's own count is what is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

_TEXT = """
able about above act add after again age ago air all along also among and any area arm art ask away back bad bank
base basic be bed begin being below best big bird black blood blue board boat body book born both box boy bread
break brown build built burn but buy call came can car card care case cat catch cause cell chair check chief child
city claim class clean clear clock close cloth cloud cold color come cook cool copy corn cost could court cover
cross cut dark data day dead deal death deep did does dog done door down draw dream drive drop dry each ear early
earth east easy eat edge egg eight else end enter equal even event ever every exact eye face fact fall far farm fast
feel feet felt few field fight fill final find fine fire first fish five floor flow fly food foot force form found
four free fresh from front fruit full fun game gas get girl give glass gold gone good grass gray great green group
grow guess guide had hair half hall hand happy hard has hat have head heart heat heavy held help her here high hill
him his hold hole home horse hot hour house how human ice idea image iron job join jump just keep key kind king know
land large last late law lay lead learn least leave led left leg less let level life light like line list live local
long look lost lot love low made main major make man many map mark may mean meat men metal might mile milk mind mine
miss money month moon more most mouth move much music must name near need never new next night nine noise none north
nose note now ocean off offer often oil old once one only open order other our out over own page pair paper part
party pass past path pay peace phone piece place plain plan plane plant play point poor post power press price print
pull pure push put quick quiet quite race radio rain raise range rate reach read ready real red reply rest rich ride
right ring rise river road rock roll room root rose round row rule run safe said salt same sand save say scale sea
seat see seed self sell send sense sent set seven shape share sharp ship shop short show side sight sign since sing
sit six size skin sky sleep slow small snow soft soil some son song soon sound south space speed spot stand star
start state stay step still stone stood stop store story study such sugar sun table tail take talk tall team tell
ten test than thank that the their them then there these they thick thin thing think third this those three thus
time tiny today tone too tool top total touch town track trade train tree trip true trust try turn two type under
unit until upon use usual value very view visit voice wait walk wall want war warm was wash watch water wave way
wear week well went were west what wheel when where which while white who whole why wide wife wild will wind wing
with woman women wood word work world would write wrong year yes yet you young your
"""
WORDS = tuple(_TEXT.split())


def as_text(ids: Sequence[int]) -> str:
    """The same text for the same ids; prompts that begin with the same ids begin with the same words.

    >>> as_text([0, 1, 2, 0])
    'able about above able'
    """
    return " ".join(WORDS[token % len(WORDS)] for token in ids)
