"""The words around a number: which may be dropped as what is counted or named, and which change the number or deny it.

Nobody can list what is counted (apples, tickets, years), and what is not listed may be a number word (5 bn), a denial (5 never)
or anything else. So words that the other side lacks are dropped only if their noun is a unit of units.py, a plural in -s or one
of _THINGS, and none of them is one of _OTHERS. Words before it (the answer is, total =) only announce it, unless one of them
denies it or says that it is something else, made from the answer. Left out: most singulars (1 apple), most other languages'
plurals (5 Bücher).
"""

from collections.abc import Callable
import re

_DENIALS = (
  "not no nope nah never none nil null nought naught contradict disagree neither nor nothing false untrue wrong incorrect "
  "invalid impossible without nobody hardly doubt doubtful lie lied lying cannot "
  "except unless but if nein nicht nichts nie niemals kein keine falsch nunca jamás jamas falso falsa nada ningún ninguno "
  "faux fausse jamais pas rien aucun aucune sbagliato não nao errado нет не неверно никогда")
_REFUSED = "rejected extraneous mistake mistaken erroneous discarded excluded ruled fake trap contradiction"  # before an answer
_OPERATIONS = "half halve halved double doubled triple tripled twice thrice plus minus mod modulo squared cubed factorial"
_NUMBERS = (
  "hundred thousand thou million billion trillion bn mn tn bln mln mld mlrd trn bil tril mill mio mrd tsd grand myriad googol "
  "grosses sixes lakh lac crore dozen doz score gross ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
  "nineteen twenty thirty forty fifty sixty seventy eighty ninety zero one two three four five six seven eight nine pair couple "
  "brace duo trio quartet quintet sextet septet octet nonet third quarter fourth fifth sixth seventh eighth ninth "
  "tenth eleventh twelfth hundredth thousandth percent percentage pct permille bp bps basis mil mille mila "
  "ciento cien centena centenar centenare millar millare decena docena medio media mitad mitade tercio cuarto quinto doble "
  "dezena dúzia duzia meia meio terço milhar milhare centaine dizaine douzaine quinzaine vingtaine millier demi demie moitié "
  "tiers dozzina dozzine decina decine centinaio centinaia migliaio migliaia mezzo mezza metà dutzend dutzende hundert hunderte "
  "tausend tausende paar halb halbe hälfte drittel viertel dozijn honderd duizend dussin tuzin дюжина дюжин десяток десятков "
  "сотня сотен млн млрд тыс")
_SENSES = (
  "and or to when where base maybe perhaps possibly probably otherwise point pi am pm below negative choose over sqrt "
  "january february march april may june july august september october november december repeating "
  "recurring approximately approx about roughly nearly almost around infinity infinite infinitely "
  "und oder oppure cada root power sine cosine tangent theta alpha beta gamma delta lambda sigma omega epsilon thereof "
  "least most reciprocal menos moins versus yes always sometimes besides fails falls lies exists thus equals exceeds differs "
  "means does has etwas mindestens höchstens")
_COUNTED_TOO = frozenset("ones zeros roots points bases powers mills triples".split())
_WORDS = frozenset(f"{_DENIALS} {_OPERATIONS} {_NUMBERS} {_SENSES}".split())
_OTHERS = (_WORDS | {word + "s" for word in _WORDS}) - _COUNTED_TOO
_NUMBER_WORD = re.compile(r"teenths?$|ieths?$|(?:twen|thir|for|fif|six|seven|eigh|nine)ties$|illions?$|illiard(?:e|en|s)?$"
                          r"|ill[oó]n(?:es)?$|illion(?:en|i)$|ilh(?:ão|ões)$|тысяч|миллион|миллиард|[0-9]")
_FUNCTION = re.compile(r"(?:sin|cos|tan|log|ln|exp|sqrt)[a-z]?$")
# In Chinese, Japanese or Korean: what changes a number, and what begins a phrase of what is counted.
_CHANGES = re.compile("[一二三四五六七八九十百万亿萬億兆半或和与與及不非零点點倍折成多余餘几幾左右约約以上下超"
                      "打双對对无無没否错錯假]|千(?![米克瓦])|分之|百分|만|억|천|백|또는|または")
_EAST_ASIAN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_OTHER_SCRIPT = re.compile("[\u0386-\u03a8\u03aa-\u03bb\u03bd-\u1eff]")  # not Ω, μ
_COUNTERS = re.compile(
  "(?:平方|立方|千)?(?:公|厘|毫|分米|米|克|斤|吨|噸|升|瓦)|[个個只隻本张張条條块塊元圆円角分秒天日周週月年岁歲歳人名位次件颗顆棵头頭匹辆輛架台"
  "支枝种種类類份套箱包袋瓶杯盒篇页頁句字题題层層度课課场場间間桶盘盤排行列组組班里돈원명개년살일월번마권장]"
  "|小时|小時|时|時|时间|時間|美|欧|英镑|日元|学生|學生|시간|분|초|킬로|미터|センチ|メートル|キロ|グラム|リットル|ドル|つ")
_BEHIND = frozenset(  # a noun's further words begin with one
  "per of in for on at from each every a an the / that who between after before during among within such".split())
_TAIL = frozenset(  # may follow a noun, or stand alone
  "old left total altogether remaining more less fewer extra additional apiece away apart later earlier sooner late early ahead "
  "together worth ago long tall high deep wide thick east west north south clockwise counterclockwise profit overall older "
  "younger taller shorter longer higher lower deeper wider faster slower farther further heavier lighter cheaper bigger larger "
  "smaller greater".split())
_THINGS = frozenset(
  "sheep deer geese mice teeth dice cattle bacteria grandchildren vertices matrices indices pcs pts ups way "
  "solution value integer number triangle student apple probability chance constant st nd rd th grade place row position term "
  "person floor century "
  "erg dyn dyne gauss torr atm mmhg pc kpc mpc arcsec arcmin rev mho aa baht".split())  # the last row: units without a table
_NO_PLURAL = ("ss", "ous", "is")


def changes_value(word: str) -> bool:
  """Whether a word behind a number makes it another number, denies it or offers a second one."""
  small = word.lower()
  return small in _OTHERS or _NUMBER_WORD.search(small) is not None or _FUNCTION.match(small) is not None


_BEFORE = re.compile(
  rf"(?<!\w)(?:{'|'.join(f'{_DENIALS} {_OPERATIONS} {_REFUSED}'.split())}|than|times|log"
  r"|about|approximately|roughly|nearly|almost)(?!\w)"
  r"|^(?:at|up|between|less|more|over|under|below|above)(?!\w)|n['’]t(?!\w)|[+*^]|\s-\s|(?:square|cube"
  r"|negative|inverse|reciprocal|opposite)(?:\s+(?:is|are|equals))?[\s:*_]*$")
_COMPLEMENT = re.compile(r"\s+(?:of|for|in|on|at|from|with|when|where)(?!\w)")


def announces(words: str) -> bool:
  """Whether words before an answer only say what it is (the number of ways): it is not half of it, nor the wrong one."""
  return _BEFORE.search(_COMPLEMENT.split(words.strip().lower(), maxsplit=1)[0]) is None


def changes_east_asian(text: str) -> bool:
  """`changes_value` of text without spaces between its words."""
  return _CHANGES.search(text) is not None


def names_things(phrase: str, unit: Callable[[str], str | None]) -> bool:
  """Whether `phrase`, which stood behind a number, says what is counted; `unit` knows the names of units."""
  words = re.findall(r"[^\W\d_]+|/", phrase)
  if any(map(changes_value, words)):
    return False
  if _EAST_ASIAN.search(phrase):
    return _COUNTERS.match(words[0]) is not None
  if _OTHER_SCRIPT.search(phrase):
    return False  # тысяч метров
  first = next((i for i, word in enumerate(words) if word.lower() in _BEHIND), len(words))
  noun = words[:first]
  while noun and noun[-1].lower() in _TAIL:
    noun.pop()
  if not noun:
    return bool(words)
  small = noun[-1].lower()
  if "times" in map(str.lower, noun[:-1]):
    return False  # 5 times something
  plural = len(small) > 3 and small.endswith("s") and not small.endswith(_NO_PLURAL)
  return plural or small in _THINGS or small.endswith(("fish", "men")) or unit(noun[-1]) is not None
