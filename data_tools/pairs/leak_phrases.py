"""Words by which a text shows that it answers another text: a correction, a critique, an answer key that was given.

Patterns over text that `verify_text.normalise` has brought to one spelling, with case folded (so the Persian alef has
no madda). They are chosen so that plain reasoning about a question does not match: "option A is incorrect" and "the
initial response to therapy" stay.
"""

import re

_EN = (
    r"(?:the )?students?'?s?'? (?:answer|response|reasoning|solution|attempt|explanation|chain of thought|conclusion"
    r"|choice|analysis|work|mistake|error)",
    r"the student (?:\w+ly )?(?:chose|selected|picked|answered|concluded|claimed|stated|said|assumed|made|misread"
    r"|misinterpreted|confused|overlooked|failed)",
    r"your (?:previous |original |earlier |initial |first )?(?:answer|response|reasoning|solution|attempt|explanation"
    r"|chain|conclusion|choice|analysis|mistake|error|critique|criticisms?|feedback|comments?|hints?)",
    r"you (?:\w+ly )?(?:chose|selected|picked|answered|concluded|claimed|mentioned|stated|pointed out|overlooked"
    r"|misread|made an? (?:mistake|error))",
    r"you(?: are|'re| were) (?:absolutely |completely )?(?:right|wrong|correct|incorrect|mistaken)",
    r"(?:previous|earlier|original) (?:answer|reasoning|chain of thought|explanation)",
    r"my (?:previous|earlier|original|initial|first) (?:answer|response|reasoning|solution|attempt|explanation|choice"
    r"|conclusion|analysis)",
    r"(?:corrected|revised) (?:answer|reasoning|response|chain|version|explanation|solution|analysis)",
    r"(?:given|based on|considering|following|according to|in light of|thanks? (?:you )?for|taking) (?:the|your|this"
    r"|these|that) (?:critiques?|criticisms?|feedback|corrections?|comments|hints?)",
    r"i (?:sincerely )?apologi[sz]e",
    r"i (?:made|had made) an? (?:mistake|error)",
    r"i was (?:wrong|mistaken|incorrect)",
    r"i (?:previously|earlier|initially|originally|mistakenly|wrongly|incorrectly) (?:said|stated|chose|selected"
    r"|picked|thought|answered|concluded|claimed)",
    r"(?:error|mistake|flaw) (?:in|of) (?:the|this|that) (?:answer|reasoning|response|chain|solution|argument"
    r"|explanation)",
    r"(?:correction|revision|corrected version)\s*:",
    r"the (?:provided|gold|golden|reference|official) (?:correct )?(?:answer|label|explanation|solution|rationale)",
    r"answer key",
)
_FA = (
    r"(?:پاسخ|جواب|استدلال|زنجیره افکار|تحلیل|انتخاب|توضیح|توضیحات)(?: ی)? (?:(?:قبلی|پیشین|اولیه|نادرست|اشتباه) )?"
    r"(?:دانشجو|دانش ?اموز|شما|مدل)",
    r"(?:پاسخ|جواب|استدلال|زنجیره افکار|تحلیل) (?:قبلی|پیشین|اولیه|ارایه شده|ارائه شده|داده شده|اصلاح شده|تصحیح شده)",
    r"(?:نسخه|پاسخ|زنجیره)(?: ی)? (?:اصلاح|تصحیح|بازبینی) ?شده",
    r"(?:با توجه به|بر ?اساس|طبق|بنا بر|مطابق) (?:این |آن )?(?:نقد|نقدها|نقدهای|نقد ها|نقد های|انتقاد|انتقادات|انتقادها"
    r"|بازخورد|بازخوردها|تصحیح|اصلاحات)",
    r"(?:دانشجو|دانش ?اموز) (?:به اشتباه|به درستی|اشتباه|انتخاب کرد|نتیجه گرفت)",
    r"شما (?:به اشتباه|به درستی|اشتباه کرد|گفتید|گفته اید|اشاره کرد|انتخاب کرد)",
    r"(?:خطا|اشتباه|ایراد)(?: ی|ی|های| های)? (?:اصلی )?(?:در|این) (?:پاسخ|استدلال|زنجیره|تحلیل)",
    r"(?:عذر ?خواهی|عذر|پوزش|معذرت) (?:می ?خواهم|می ?کنم|میطلبم|می طلبم)",
    r"پاسخ (?:مرجع|نامه)|پاسخنامه|کلید (?:پاسخ|سوال)",
    r"(?:تصحیح|اصلاحیه)\s*:",
)
_ZH = (
    r"(?:学生|考生|同学|你|您)(?:之前|先前|原来|刚才)?的(?:原|原始|错误)?(?:回答|答案|推理|思路|解答|分析|解释|选择|错误)",
    r"(?:学生|考生|你|您)(?:错误地|误认|误将|误以|选择了|选了|之前|刚才|提到|指出|忽略了|混淆了)",
    r"(?:你|您)说得?对",
    r"(?:之前|先前|此前|原来|原先|刚才)的?(?:错误)?(?:回答|答案|推理|解答|分析|选择)",
    r"原(?:答案|回答|推理|解答)",
    r"(?:更正|修正|纠正|改正|修改)(?:后|过|之后)?的?(?:回答|答案|推理|思路|版本|解答|分析)",
    r"(?:更正|修正|纠正|订正)(?:如下|:)",
    r"(?:根据|鉴于|考虑到|感谢|按照|结合)(?:你|您|老师|上述|以上|这些|该)?的?(?:批评|反馈|指正|点评|评语|批注|意见)",
    r"抱歉|对不起",
    r"我(?:之前|刚才|先前|最初)(?:的|错|误|认为|选|说|回答)",
    r"参考答案|所给(?:的)?(?:答案|解析)|给出的解析",
)

BUILT_IN: dict[str, tuple[str, ...]] = {"en": _EN, "fa": _FA, "zh": _ZH}
"""Language to patterns."""

ORDINALS_OF_RANK = frozenset(
    (
        "first second third fourth fifth sixth seventh eighth ninth tenth اول دوم سوم چهارم پنجم ششم هفتم هشتم نهم دهم"
    ).split()
)
"""Words for a place in a list; "one" and "two" count things too."""
CHINESE_NTH = re.compile(r"第\s*(?P<label>[一二三四五六七八九十]|\d{1,2})\s*个?(?:选项|选择|答案|项)")
"""第二个选项; 第二 alone counts the points of a critique."""
