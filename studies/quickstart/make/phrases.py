"""Short everyday phrases in Danish, Dutch and English: numbers, times, dates, commands, messages, names of things.

A phrase is drawn from a small grammar: `<slot>` is replaced by one of the slot's alternatives, again and again until
no slot is left. Numbers are spelled the way each language spells them (Dutch and Danish write "five-and-twenty" as
one word), so the vocabulary is a few hundred words per language.
"""

import random
import re

LANGUAGES = ("da", "nl", "en")

_ONES = {
    "da": "nul en to tre fire fem seks syv otte ni ti elleve tolv tretten fjorten femten seksten sytten atten nitten",
    "nl": "nul een twee drie vier vijf zes zeven acht negen tien elf twaalf dertien veertien vijftien zestien zeventien "
    "achttien negentien",
    "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen",
}
_TENS = {
    "da": "tyve tredive fyrre halvtreds tres halvfjerds firs halvfems",
    "nl": "twintig dertig veertig vijftig zestig zeventig tachtig negentig",
    "en": "twenty thirty forty fifty sixty seventy eighty ninety",
}


def spell(number: int, language: str) -> str:
    """The number, from 0 to 9,999, in words."""
    ones, tens = _ONES[language].split(), _TENS[language].split()
    if number < 20:
        return ones[number]
    if number < 100:
        ten, one = divmod(number, 10)
        if one == 0:
            return tens[ten - 2]
        if language == "en":
            return f"{tens[ten - 2]} {ones[one]}"
        link = "og" if language == "da" else ("ën" if ones[one].endswith("e") else "en")
        return ones[one] + link + tens[ten - 2]
    unit, size = ("thousand", 1000) if number >= 1000 else ("hundred", 100)
    count, rest = divmod(number, size)
    if language == "en":
        head = f"{ones[count]} {unit}"
        return head if rest == 0 else f"{head} {'and ' if rest < 100 else ''}{spell(rest, language)}"
    if language == "da":
        head = f"{'et' if count == 1 else ones[count]} {'tusind' if size == 1000 else 'hundrede'}"
        return head if rest == 0 else f"{head} {'og ' if rest < 100 else ''}{spell(rest, language)}"
    word = "duizend" if size == 1000 else "honderd"
    head = word if count == 1 else ones[count] + word
    return head if rest == 0 else f"{head} {spell(rest, language)}"


# One slot a line: `name = alternative | alternative | …`. The slot `phrase` is where every draw starts; its
# alternatives are equally likely.
_GRAMMAR = {
    "en": """
phrase = <verb> the <thing> <place> | <verb> the <colour> <thing> | set <alarm> for <clock> | the <event> is on <day> | the <event> starts at <clock> | it is <clock> | <person> was born in <month> <year> | on the <ordinal> of <month> | call <person> <when> | <person> and <person> live in <city> | <person> bought <count> <things> | the number is <digits> | it costs <count> euros and <count> cents | there are <count> <things> <place> | the weather in <city> is <weather> <when> | please <command> | <command> <when> | how far is it to <city> | where is my <colour> <thing> | I would like <count> <things> please | the train to <city> leaves at <clock> | my <family> is <adjective> today | the <thing> is <adjective> and the <thing> is <adjective> | turn the <device> <direction> | the temperature is <count> degrees | remind me to <chore> <when> | <person> wants to <chore> | room <count> is on the <ordinal> floor | flight <digits> to <city> is late | send <person> a message | <day> the <ordinal> of <month> | do you want <food> or <food> | we eat <food> with <food> <when> | my <family> likes <food>
verb = open | close | clean | find | bring | take | move | paint | sell | repair | carry | hide
thing = door | window | table | chair | lamp | book | bottle | bicycle | key | box | letter | picture | mirror | clock | jacket | blanket | basket | hammer | ladder | suitcase | piano | candle
things = apples | books | bottles | tickets | chairs | flowers | stamps | candles | oranges | glasses | pencils | letters | boxes | eggs
place = in the kitchen | in the garden | on the roof | under the bed | behind the house | at the office | in the hall | next to the school | near the bridge | above the shop
colour = red | blue | green | yellow | black | white | brown | grey | purple | orange
alarm = an alarm | a timer | the alarm | a reminder
event = meeting | concert | party | lesson | exam | wedding | market | film | game | dinner
day = monday | tuesday | wednesday | thursday | friday | saturday | sunday
month = january | february | march | april | may | june | july | august | september | october | november | december
when = today | tomorrow | tonight | next week | in the morning | in the afternoon | this evening | on <day> | before noon | in <count> minutes | later
person = anna | peter | maria | thomas | emma | jacob | sarah | martin | laura | oliver | sophie | david | julia | robert
city = london | copenhagen | amsterdam | berlin | paris | dublin | oxford | brussels | madrid | vienna | boston | bristol
weather = sunny | cold | warm | windy | cloudy | dry | wet | foggy
command = play some music | stop the music | turn off the light | turn on the heating | read the news | lock the front door | show me the map | cancel my appointment | answer the phone | make a shopping list | start the washing machine | take a picture
family = brother | sister | mother | father | uncle | aunt | neighbour | doctor | teacher | friend
adjective = tired | happy | broken | heavy | clean | empty | strong | quiet | full | late | expensive | new
device = radio | television | volume | heating | light | fan
direction = up | down | on | off
chore = buy milk | call the doctor | water the plants | feed the cat | pay the bill | wash the car | walk the dog | post the letter | bake a cake | cut the grass
food = bread | cheese | soup | fish | rice | salad | chicken | potatoes | beans | coffee | tea | butter
ordinal = first | second | third | fourth | fifth | sixth | seventh | eighth | ninth | tenth | twelfth | twentieth
""",
    "da": """
phrase = <verb> <thing> <place> | <verb> den <colour> <noun> | sæt <alarm> til klokken <clock> | <event> er på <day> | <event> begynder klokken <clock> | klokken er <clock> | <person> er født i <month> <year> | den <ordinal> <month> | ring til <person> <when> | <person> og <person> bor i <city> | <person> købte <count> <things> | nummeret er <digits> | det koster <count> kroner og <count> øre | der er <count> <things> <place> | vejret i <city> er <weather> <when> | vær så venlig at <command> | hvor langt er der til <city> | hvor er min <colour> <noun> | jeg vil gerne have <count> <things> | toget til <city> kører klokken <clock> | min <family> er <adjective> i dag | skru <direction> for <device> | temperaturen er <count> grader | husk mig på at <chore> <when> | <person> vil gerne <chore> | værelse <count> er på <ordinal> sal | fly <digits> til <city> er forsinket | send en besked til <person> | <day> den <ordinal> <month> | vil du have <food> eller <food> | vi spiser <food> med <food> <when> | min <family> kan godt lide <food> | kan du <command> <when> | <thing> er <adjective>
verb = åbn | luk | find | hent | tag | flyt | mal | sælg | reparer | bær | gem | vask
thing = døren | vinduet | bordet | stolen | lampen | bogen | flasken | cyklen | nøglen | kassen | brevet | billedet | spejlet | uret | jakken | tæppet | kurven | hammeren | stigen | kufferten | klaveret
noun = dør | stol | lampe | bog | flaske | cykel | nøgle | kasse | jakke | kurv | stige | kuffert | skjorte | taske
things = æbler | bøger | flasker | billetter | stole | blomster | frimærker | lys | appelsiner | glas | blyanter | breve | kasser | æg
place = i køkkenet | i haven | på taget | under sengen | bag huset | på kontoret | i gangen | ved siden af skolen | ved broen | over butikken
colour = røde | blå | grønne | gule | sorte | hvide | brune | grå | lilla | orange
alarm = en alarm | et vækkeur | alarmen | en påmindelse
event = mødet | koncerten | festen | timen | eksamen | brylluppet | markedet | filmen | kampen | middagen
day = mandag | tirsdag | onsdag | torsdag | fredag | lørdag | søndag
month = januar | februar | marts | april | maj | juni | juli | august | september | oktober | november | december
when = i dag | i morgen | i aften | næste uge | om morgenen | om eftermiddagen | på <day> | før middag | om <count> minutter | senere
person = anne | peter | maria | thomas | emma | jakob | søren | martin | laura | oliver | sofie | mette | julie | rasmus
city = london | københavn | amsterdam | berlin | paris | aarhus | odense | aalborg | madrid | oslo | stockholm | esbjerg
weather = solrigt | koldt | varmt | blæsende | skyet | tørt | vådt | tåget
command = spille noget musik | stoppe musikken | slukke lyset | tænde for varmen | læse nyhederne | låse hoveddøren | vise mig kortet | aflyse min aftale | tage telefonen | lave en indkøbsliste | starte vaskemaskinen | tage et billede
family = bror | søster | mor | far | onkel | tante | nabo | læge | lærer | ven
adjective = træt | glad | ødelagt | tung | ren | tom | stærk | stille | fuld | forsinket | dyr | ny
device = radioen | fjernsynet | lyden | varmen | lyset | musikken
direction = op | ned
chore = købe mælk | ringe til lægen | vande planterne | fodre katten | betale regningen | vaske bilen | gå tur med hunden | sende brevet | bage en kage | slå græsset
food = brød | ost | suppe | fisk | ris | salat | kylling | kartofler | bønner | kaffe | te | smør
ordinal = første | anden | tredje | fjerde | femte | sjette | syvende | ottende | niende | tiende | tolvte | tyvende
""",
    "nl": """
phrase = <verb> de <thing> <place> | <verb> de <colour> <thing> | zet <alarm> om <clock> | <event> is op <day> | <event> begint om <clock> | het is <clock> | <person> is geboren in <month> <year> | op de <ordinal> <month> | bel <person> <when> | <person> en <person> wonen in <city> | <person> kocht <count> <things> | het nummer is <digits> | het kost <count> euro en <count> cent | er zijn <count> <things> <place> | het weer in <city> is <weather> <when> | kun je <command> | kun je <when> <command> | hoe ver is het naar <city> | waar is mijn <colour> <thing> | ik wil graag <count> <things> | de trein naar <city> vertrekt om <clock> | mijn <family> is vandaag <adjective> | de <thing> is <adjective> en de <thing> is <adjective> | zet <device> <direction> | de temperatuur is <count> graden | herinner mij eraan <when> <chore> | <person> wil graag <chore> | kamer <count> is op de <ordinal> verdieping | vlucht <digits> naar <city> is te laat | stuur een bericht naar <person> | <day> de <ordinal> <month> | wil je <food> of <food> | wij eten <food> met <food> <when> | mijn <family> houdt van <food>
verb = open | sluit | zoek | breng | pak | verplaats | verf | verkoop | repareer | draag | verstop | poets
thing = deur | tafel | stoel | lamp | fles | fiets | sleutel | doos | brief | spiegel | klok | jas | deken | mand | hamer | ladder | koffer | piano | kaars | kast | tas
things = appels | boeken | flessen | kaartjes | stoelen | bloemen | postzegels | kaarsen | sinaasappels | glazen | potloden | brieven | dozen | eieren
place = in de keuken | in de tuin | op het dak | onder het bed | achter het huis | op kantoor | in de gang | naast de school | bij de brug | boven de winkel
colour = rode | blauwe | groene | gele | zwarte | witte | bruine | grijze | paarse | oranje
alarm = een wekker | een alarm | de wekker | een herinnering
event = de vergadering | het concert | het feest | de les | het examen | de bruiloft | de markt | de film | de wedstrijd | het diner
day = maandag | dinsdag | woensdag | donderdag | vrijdag | zaterdag | zondag
month = januari | februari | maart | april | mei | juni | juli | augustus | september | oktober | november | december
when = vandaag | morgen | vanavond | volgende week | in de ochtend | in de middag | op <day> | voor de middag | over <count> minuten | later
person = anna | peter | maria | thomas | emma | jacob | sanne | maarten | laura | willem | sofie | david | julia | joris
city = londen | kopenhagen | amsterdam | berlijn | parijs | utrecht | rotterdam | brussel | madrid | groningen | antwerpen | leiden
weather = zonnig | koud | warm | winderig | bewolkt | droog | nat | mistig
command = muziek spelen | de muziek stoppen | het licht uitdoen | de verwarming aanzetten | het nieuws lezen | de voordeur sluiten | de kaart laten zien | mijn afspraak afzeggen | de telefoon opnemen | een boodschappenlijst maken | de wasmachine aanzetten | een foto maken
family = broer | zus | moeder | vader | oom | tante | buurman | dokter | leraar | vriend
adjective = moe | blij | kapot | zwaar | schoon | leeg | sterk | stil | vol | laat | duur | nieuw
device = de radio | de televisie | de verwarming | het licht | het geluid | de muziek
direction = harder | zachter | aan | uit
chore = melk kopen | de dokter bellen | de planten water geven | de kat voeren | de rekening betalen | de auto wassen | de hond uitlaten | de brief versturen | een taart bakken | het gras maaien
food = brood | kaas | soep | vis | rijst | salade | kip | aardappelen | bonen | koffie | thee | boter
ordinal = eerste | tweede | derde | vierde | vijfde | zesde | zevende | achtste | negende | tiende | twaalfde | twintigste
""",
}

_SLOTS = {
    language: {
        name.strip(): [alternative.strip() for alternative in alternatives.split("|")]
        for name, alternatives in (line.split("=") for line in text.strip().splitlines())
    }
    for language, text in _GRAMMAR.items()
}

_CLOCK = {
    "en": ["{h} o'clock", "half past {h}", "quarter past {h}", "quarter to {h}", "{m} minutes past {h}", "{m} to {h}"],
    "da": ["{h}", "halv {h}", "kvart over {h}", "kvart i {h}", "{m} minutter over {h}", "{m} minutter i {h}"],
    "nl": ["{h} uur", "half {h}", "kwart over {h}", "kwart voor {h}", "{m} over {h}", "{m} voor {h}"],
}


def _number_slot(slot: str, language: str, rng: random.Random) -> str | None:
    if slot == "count":
        return spell(rng.choice([rng.randint(2, 20), rng.randint(21, 99), rng.randint(100, 999)]), language)
    if slot == "year":
        return spell(rng.randint(1900, 2030) if language != "en" else rng.randint(2000, 2030), language)
    if slot == "digits":
        return " ".join(spell(rng.randint(0, 9), language) for _ in range(rng.randint(3, 5)))
    if slot == "clock":
        form = rng.choice(_CLOCK[language])
        return form.format(h=spell(rng.randint(1, 12), language), m=spell(rng.choice([5, 10, 20, 25, 12, 18]), language))
    return None


def draw(language: str, rng: random.Random) -> str:
    """One phrase: lowercase, words separated by single spaces."""
    text = "<phrase>"
    while match := re.search(r"<(\w+)>", text):
        slot = match[1]
        value = _number_slot(slot, language, rng) or rng.choice(_SLOTS[language][slot])
        text = text[: match.start()] + value + text[match.end() :]
    return text.lower()


def draw_distinct(count: int, language: str, rng: random.Random, taken: set[str]) -> list[str]:
    """`count` phrases, none of them in `taken` and no two alike; `taken` grows by them."""
    phrases: list[str] = []
    while len(phrases) < count:
        phrase = draw(language, rng)
        if phrase not in taken:
            taken.add(phrase)
            phrases.append(phrase)
    return phrases


def vocabulary() -> dict[str, set[str]]:
    """The words seen in many draws, by language."""
    rng = random.Random(0)
    return {language: {w for _ in range(20_000) for w in draw(language, rng).split()} for language in LANGUAGES}


if __name__ == "__main__":
    for language, words in vocabulary().items():
        rng = random.Random(1)
        print(language, len(words), "words:", " / ".join(draw(language, rng) for _ in range(6)))
