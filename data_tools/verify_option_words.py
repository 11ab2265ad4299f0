"""The words around an option in English, Persian, Arabic and Chinese: what announces one, what follows, what denies it.

Patterns over text that `verify_text.normalise` has brought to one spelling, in lower case (Chinese and Persian have
none). A lead ends right before the option; a trail begins right after it. `verify_option` puts them together.
"""

import re

MAX_OPTIONS = 10
PERSIAN = ("الف", "ب", "ج", "د", "ه", "و", "ز", "ح", "ط", "ی")
STEMS = "甲乙丙丁戊己庚辛壬癸"
NUMERALS = "一二三四五六七八九十"
ORDINALS = {
    word: index
    for row in (
        "first second third fourth fifth sixth seventh eighth ninth tenth",
        "one two three four five six seven eight nine ten",
        "اول دوم سوم چهارم پنجم ششم هفتم هشتم نهم دهم",
        "یک دو سه چهار پنج شش هفت هشت نه ده",
        "الاول الثانی الثالث الرابع الخامس السادس السابع الثامن التاسع العاشر",
        "一 二 三 四 五 六 七 八 九 十",
    )
    for index, word in enumerate(row.split())
}
"""Words for a place in the list; they count only beside a word for "option"."""

OPTION_WORD = (
    r"(?:\b(?:option|choice|letter|alternative)\b|(?<!\w)(?:گزینه(?: ی)?(?=\W)|مورد|حرف|الخیار)(?!\w)|选项|选择|第)"
)
FILLER = re.compile(
    r"(?:[\s\"(\[{<:=,$]|'(?!s\b)|-(?=[\s(a-z])|[-=]?>|\\boxed\s*"
    r"|\b(?:the|this|that|option|choice|letter|alternative|answer|correct|therefore|thus|clearly|most likely|likely"
    r"|probably|definitely|both|either|simply|just|indeed|only|number|is|be|as|would|final|with|on|for)\b(?!')"
    r"|(?<!\w)(?:گزینه ی(?=[\s(:\"\[])|گزینه|مورد|همان|حرف|شماره|برابر|با|عبارت|است|از|یعنی|الخیار|هو|هی|رقم)(?!\w)"
    r"|选项|选择|选|是|为|应该|应|该|第|就|字母|答案|其中的|的){1,40}"
)
"""What may stand between a lead and the option."""
CONJUNCTION = re.compile(
    r"\s*(?:[,、/&+]|\b(?:and|or|as well as|and/or)\b|(?<!\w)(?:و|یا|او)(?!\w)|和|或者?|与|以?及)\s*"
)

LEADS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"\b(?:ans(?:wer)?|choice|option|response|selection)s?\b[\"']?(?: (?:to|for|of|in) (?:the |this "
        r"|that |your |my )?\w+(?: \d+)?| here)?\s*(?:is|are|was|'s|(?:would|should|must|will|has to|can only"
        r"|could only) be|=|:|[-=]?>|→|⇒"
        r"|-(?= ))",
        r"\bans(?:wer)?\s+(?=\(?[a-z\d]\)?[.\s]*$)",
        r"\bcorrect\s*(?:one|letter|statement)?\s*(?:is|:)",
        r"\b(?:i|we|i'll|we'll|i'd|let's|let me)\s+(?:(?:would|will|should|must|can|therefore|thus|now|have to"
        r"|am going to|'d|'ll)\s+)*(?:choose|pick|select|chose|picked|selected|go with|am going with|went with|opt for"
        r"|vote for|settle on|say|answer)\b",
        r"\b(?:so|thus|hence|therefore|finally|actually|wait|no|sorry|rather|but)\b"
        r",?\s+(?:here )?it(?:'s| is| must be)\b",
        r"\b(?:not|isn't) (?:option |choice )?\(?[a-j1-9]\)?,? (?:but|it's|it is)\b(?: rather\b| instead\b)?",
        r"####",
        r"(?<!\w)(?:پاسخ|جواب)(?:\s+(?:ی|صحیح|درست|نهایی|مناسب|من|ما|این|سوال|پرسش|برای|مورد|نظر|به|شما|هم|نیز|ها))*\s*"
        r"(?:عبارت است از|برابر است با|برابر با|همان|می شود|میشود|است|:|=|,|یعنی)?(?=\W)",
        r"(?<!\w)گزینه(?: ی)?(?:\s+(?:صحیح|درست|نهایی|من|مناسب|برتر|مورد نظر))+\s*(?:است|:|=|,|برابر است با)?",
        r"(?<!\w)(?:بهترین|صحیح ?ترین|درست ?ترین|مناسب ?ترین)\s+(?:گزینه|پاسخ|جواب)\s*:?",
        r"(?<!\w)(?:الاجابه|الجواب|اجابه|الحل)(?:\s+(?:الصحیحه|الصحیح|النهائیه|النهایی|هو|هی|الاصح))*\s*:?",
        r"(?<!\w)الخیار(?:\s+(?:الصحیح|الاصح|هو))+\s*:?",
        r"(?:(?:正确|最佳|最终|标准)的?选项|答案?)[\])]?(?:应该|应当|应|就|只能|显然|肯定)?(?:是|为|选择?|:|=|,)*(?!案)",
        r"(?<![不别勿备挑筛可待])选(?![项出取手])择?(?:的?(?:是|为))?:?",
        r"(?<!不)(?:正确|最佳|最可能|最合适|符合题意)的?(?:一项|选项|说法|答案|诊断)?(?:是|为|:)",
    )
)
TRAILS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\s+(?:is|seems|must be|would be|should be|remains|appears to be)\s+(?:(?:clearly|definitely|most likely"
        r"|probably|therefore|thus|indeed|the|only|single|one|my|final)\s+)*(?:correct|right|best|answer|most (?:likely"
        r"|appropriate|suitable|accurate))\b",
        r"\s*(?:به عنوان (?:پاسخ|جواب)\s*)?(?:صحیح|درست|پاسخ|جواب|مناسب|بهترین)\s*(?:ترین)?\s*(?:\w+\s+){0,2}?"
        r"(?:است|می باشد|میباشد|هست|خواهد بود)(?!\w)",
        r"\s*را\s+(?:به عنوان \w+\s*(?:صحیح|درست|نهایی)?\s*)?(?:انتخاب|برمی|بر می)",
        r"\s*(?:هو|هی)?\s*(?:الصحیح|صحیح|الاصح|الاجابه)(?!\w)",
        r"\s*(?:选项|项)?\s*(?:是|为)?\s*最?(?:正确|符合题意|合适|对(?![于比照应]))",
    )
)
DENIED_AFTER = re.compile(
    r"\s*[)\]\"']*(?:\?|\s*(?:is|was|are|would be|seems|can be|must be|option is)(?: \w+)? (?:not|wrong|incorrect"
    r"|false|ruled out|excluded|eliminated|unlikely|out)\b|\s*(?:isn't|wasn't|doesn't|does not|can't|cannot"
    r"|can not|would not|wouldn't)\b|[^.\n]{0,40}?"
    r"(?<!\w)(?:نیست|نمی باشد|نمیباشد|نادرست|غلط|اشتباه|رد می شود|رد میشود|نمی تواند|نمیتواند|خطا|خاطئ)(?!\w)"
    r"|\s*(?:选项|项)?(?:是|为)?(?:不|错|吗|排除|有误|误))"
)
"""What follows an option that is asked about or ruled out."""
AFTER_LATIN = re.compile(
    r"\s+(?:because|since|as|for|which|that|and|or|with|due|although|but|based|given|from|per|in|is|are|being|option"
    r"|choice|answer|rather|not|instead|so|if|here|on|by|to|where|while|when|it|this|these|then|therefore)\b"
)
AFTER_PERSIAN = re.compile(
    r"\s+(?:است|می|میباشد|زیرا|چون|به|صحیح|درست|را|که|و|یا|هست|خواهد|بوده|پاسخ|جواب|از|با|در|نیست|هو|لان|صحیح)(?!\w)"
)
AFTER_CHINESE = re.compile(r"[项选是正因由对错不吗,和或与及]|以及")
PLURAL_AFTER = re.compile(
    r"\s*(?:$|[.,;:!?)\]}\"'\n。、]|(?:are|both|only|options|together)\b|(?:هستند|صحیح|درست|هر دو|است)(?!\w)"
    r"|[都均项正]|(?:and|or)\b|[和或与])"
)
NONE_OF_THEM = re.compile(
    r"none\b(?: of (?:the )?(?:above|these|them|those|options?|choices|answers|given|listed|provided|following)\w*)?"
    r"|neither\b|no (?:correct |right )?(?:option|answer|choice)\b|not (?:listed|among|given|present)\b"
    r"|هیچ ?(?:کدام|یک)(?: از (?:موارد|گزینه ?ها|اینها)(?: (?:بالا|فوق))?)?"
    r"|以上[都皆均]?[不非](?:是|对|正确)?|[都均]不[是对]|没有正确"
    r"|لا شیء مما سبق"
)
ALL_OF_THEM = re.compile(
    r"all (?:of )?(?:the )?(?:above|these|them|options)\b|(?:همه|تمام|کلیه)(?:ی)? ?(?:موارد|گزینه ?ها)"
    r"(?: (?:بالا|فوق))?|以上[都皆均]?(?:是|对|正确)|جمیع ما سبق"
)
CORRECTION = re.compile(
    r"\b(?:wait|however|actually|sorry|correction|mistake|re-?(?:check|consider|think|examin|evaluat)\w*"
    r"|on second thought|no,|hmm|but|instead|corrected|let me)\b"
    r"|(?<!\w)(?:نه|صبر|اصلاح|اما|ولی|بلکه|ببخشید|اشتباه)(?!\w)"
    r"|等等|不对|但|更正|重新|抱歉|然而",
)
"""Words by which a text takes back an answer before it gives another."""
