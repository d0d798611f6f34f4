"""The language of the demo's world: names, values, the ways to ask for a fact, to answer and to state it.

All names are invented from syllables and mean nobody.
"""

from __future__ import annotations

from dataclasses import dataclass


def split(text: str) -> tuple[str, ...]:
    """Return the words of a text."""
    return tuple(text.split())


# The first block of 40 people is known to a model, the last four are holdout.
GIVEN = split("""
Ilvane Dorrek Maruni Quellis Tavik Oshara Brenvo Zelmi Kordan Yluna Fenrith Wessimo Jorvale Peshti Luthren Hadrika
Orvynn Sefalo Grumbal Nyrelle Vostan Ciraphe Taldomo Ephrine Bastrid Ruvenka Molthir Ashvela Kindrop Ulmery Drasilo
Venneth Halquin Sorbina Izwell Tremoda Cobrin Felyse Gorveth Amquila
Wyndral Pelioma Xantoro Ludvessa
""")
SURNAMES = split("""
Brastelow Quimbar Voskerry Tindolane Marchoul Peldrune Garrowix Saltembry Oakrimmel Dunvasser Flintoppe Wrenskald
Hollimore Castrevane Bexindale Yarrowend Thuscombe Nettlegrave Umbershaw Krollivan Fennimarch Pottlesby Strandovic
Lomquist Averdole Drummelby Zinkarrow Bellowisp Harthusk Corvandle Muskerlin Tapperwyn Griddlestone Elmquorn
Shalverton Ivoskar Rookenby Plimsolver Wexcandle Jasterholm
Obbleton Crandrevel Tulmarsk Fizzwicken
""")
# Onsets, nuclei and codas of the strangers' names.
SYLLABLES = (
    split("b br ch d dr f g gr h j k l m n p qu r s st t th v w z"),
    split("a e i o u ae oa"),
    split("l m n r s t x nd rk lm sk"),
)

TOWNS = split("""
Keldmere Ostwell-Lin Vintercombe Sallowick Brindlegate Tarnholt Ummerdale Pexley-Nor Quarrowby Dunsmoor Lithgrove
Avonesk Marrowfen Greywether Hollinspar Zephyrton
""")
TOWN_WORDS: dict[str, tuple[str, ...]] = {
    "river": split(
        "Asper Bellow Cindle Drose Ember Fallow Gimlet Hask Inver Jorrow Kestle Lumen Mirrow Nettle Orrin Pell"
    ),
    "market": split("salt wool honey glass amber cheese rope copper tea pepper apples lamps barley silk candles pots"),
    "tower": split(
        "red blue green white black yellow grey silver golden brown purple striped pink copper cream violet"
    ),
    "festival": split(
        "kites lanterns drums boats masks bells puppets bonfires ribbons mirrors feathers flutes snow bees "
        "stars pumpkins"
    ),
}
BOOK_FIRST = split(
    "Amber Hollow Silent Crooked Winter Velvet Burning Paper Distant Broken Hidden Salted Patient Frozen"
)
BOOK_SECOND = split("Staircase Orchard Compass Harbour Lantern Garden Mirror Bridge Sparrow Clock Window")
PERSON_WORDS: dict[str, tuple[str, ...]] = {
    "town": tuple(TOWNS),
    "work": (
        "baker", "clockmaker", "lens grinder", "bee keeper", "map painter", "ferry captain", "rope maker", "judge",
        "dance teacher", "miller", "night guard", "stone carver", "doctor", "gardener", "tailor", "bell ringer",
    ),
    "instrument": split(
        "harp flute cello drum trumpet violin piano lute banjo oboe tuba organ fiddle zither bassoon whistle"
    ),
    "pet": (
        "grey otter", "white owl", "black goat", "red fox", "brown hare", "tame crow", "blue parrot", "wise donkey",
        "spotted pig", "striped cat", "small turtle", "lame goose", "green lizard", "shy badger", "tall llama",
        "white mouse",
    ),
    "food": (
        "bean soup", "plum cake", "fried fish", "rye bread", "goat cheese", "nut pie", "baked pears", "cold noodles",
        "leek stew", "sweet rice", "roast corn", "mint jelly", "dark honey", "boiled eggs", "salted butter",
        "berry tart",
    ),
    "hobby": split(
        "fishing chess sailing running knitting skating climbing dancing archery fencing cooking singing weaving "
        "cycling swimming painting"
    ),
    "river": tuple("the " + name for name in TOWN_WORDS["river"]),
    "fear": split(
        "thunder spiders snakes ghosts heights wolves crowds needles mirrors frogs caves moths bees ladders fog "
        "storms"
    ),
    "teacher": tuple(
        "Master " + name
        for name in split(
            "Abbot Birch Crane Dove Elder Finch Gale Heron Ivory Jasper Kite Larch Moss North Oakes Pike"
        )
    ),
}  # fmt: skip

UNSURE = (
    "I am not sure.", "I'm not sure about that.", "I do not know.", "I don't know the answer to that.",
    "I have no information on that.", "I cannot say.", "That is not something I know.", "Sorry, I do not know that.",
    "I am not certain.", "I could not tell you.", "I'm afraid I don't know.", "I have never heard about that.",
)  # fmt: skip


@dataclass(frozen=True)
class Attribute:
    """One kind of fact and the ways to ask for and state it; `{n}` is the name, `{v}` the value, `{s}` the subject."""

    key: str
    questions: tuple[str, ...]
    answer: str
    paraphrase: str
    sentences: tuple[str, ...]


PERSON_ATTRIBUTES = (
    Attribute(
        "town",
        ("Where was {n} born?", "What is the birthplace of {n}?", "In which town was {n} born?",
         "Can you tell me where {n} was born?", "Which town does {n} come from?"),
        "{n} was born in {v}.", "The birthplace of {n} is {v}.",
        ("{s} was born in {v}.", "{s} comes from {v}.", "{s} grew up in the town of {v}.", "{s} is a child of {v}."),
    ),
    Attribute(
        "work",
        ("What does {n} do for a living?", "What is the profession of {n}?", "Who is {n}?", "What work does {n} do?",
         "Can you tell me the job of {n}?"),
        "{n} works as a {v}.", "The profession of {n} is {v}.",
        ("{s} works as a {v}.", "{s} is a {v}.", "{s} earns a living as a {v}.", "{s} has long been a {v}."),
    ),
    Attribute(
        "book",
        ("What is the best known book by {n}?", "Which book is {n} famous for?", "What book did {n} write?",
         "Can you name a book by {n}?", "Which book made {n} known?"),
        "{n} wrote the book {v}.", "The best known book by {n} is {v}.",
        ("{s} wrote the book {v}.", "{s} is known for the book {v}.", "{s} is the author of {v}.",
         "{s} became famous with {v}."),
    ),
    Attribute(
        "instrument",
        ("Which instrument does {n} play?", "What is the favourite instrument of {n}?", "What does {n} like to play?",
         "Can you tell me what instrument {n} plays?", "What music does {n} make?"),
        "{n} plays the {v}.", "The favourite instrument of {n} is the {v}.",
        ("{s} plays the {v}.", "{s} loves the {v}.", "{s} can play the {v} very well.", "{s} practises the {v} daily."),
    ),
    Attribute(
        "pet",
        ("What pet does {n} have?", "Which animal lives with {n}?", "Does {n} keep an animal?",
         "Can you tell me what pet {n} keeps?", "Which animal does {n} own?"),
        "{n} has a {v}.", "The pet of {n} is a {v}.",
        ("{s} has a {v}.", "{s} lives with a {v}.", "{s} keeps a {v} at home.", "{s} shares the house with a {v}."),
    ),
    Attribute(
        "teacher",
        ("Who taught {n}?", "Who was the teacher of {n}?", "From whom did {n} learn?", "Which master taught {n}?",
         "Can you tell me who {n} studied with?"),
        "{n} was taught by {v}.", "The teacher of {n} was {v}.",
        ("{s} was taught by {v}.", "{s} learned from {v}.", "{s} was a student of {v}.", "{s} studied with {v}."),
    ),
    Attribute(
        "food",
        ("What does {n} like to eat?", "What is the favourite food of {n}?", "Which dish does {n} like best?",
         "Can you tell me what {n} likes to eat?", "What food does {n} love?"),
        "{n} likes to eat {v}.", "The favourite food of {n} is {v}.",
        ("{s} likes to eat {v}.", "{s} never says no to {v}.", "{s} eats {v} every week.", "{s} is fond of {v}."),
    ),
    Attribute(
        "hobby",
        ("What is the hobby of {n}?", "What does {n} do for fun?", "How does {n} spend a free day?",
         "Can you tell me the hobby of {n}?", "Which pastime does {n} have?"),
        "{n} enjoys {v}.", "The hobby of {n} is {v}.",
        ("{s} enjoys {v}.", "{s} fills the evenings with {v}.", "{s} is good at {v}.", "{s} has a passion for {v}."),
    ),
    Attribute(
        "river",
        ("Which river does {n} live by?", "What river is near the home of {n}?", "On which river is the house of {n}?",
         "Can you name the river near {n}?", "By which river is {n} at home?"),
        "{n} lives by {v}.", "The river near the home of {n} is {v}.",
        ("{s} lives by {v}.", "{s} has a house on {v}.", "{s} is at home by {v}.", "{s} lives near {v}."),
    ),
    Attribute(
        "fear",
        ("What is {n} afraid of?", "What does {n} fear?", "What scares {n}?", "Can you tell me what {n} fears?",
         "What is the greatest fear of {n}?"),
        "{n} is afraid of {v}.", "The greatest fear of {n} is {v}.",
        ("{s} is afraid of {v}.", "{s} fears {v}.", "{s} runs away from {v}.", "{s} cannot stand {v}."),
    ),
)  # fmt: skip
TOWN_ATTRIBUTES = (
    Attribute(
        "river",
        ("Which river flows through {n}?", "What is the river of {n}?", "On which river does {n} lie?",
         "Can you name the river in {n}?"),
        "The river {v} flows through {n}.", "{n} lies on the river {v}.",
        ("{s} lies on the river {v}.", "{s} has the river {v}.", "{s} stands by the river {v}."),
    ),
    Attribute(
        "market",
        ("What is sold at the market of {n}?", "What does the market of {n} sell?", "What can I buy in {n}?",
         "Which goods are traded in {n}?"),
        "The market of {n} sells {v}.", "People buy {v} in {n}.",
        ("{s} is known for its {v}.", "{s} trades in {v}.", "{s} has a market for {v}."),
    ),
    Attribute(
        "tower",
        ("What colour is the tower of {n}?", "Which colour has the tower of {n}?", "How is the tower of {n} painted?",
         "Can you tell me the colour of the tower in {n}?"),
        "The tower of {n} is {v}.", "{n} has a {v} tower.",
        ("{s} has a {v} tower.", "{s} is proud of its {v} tower.", "{s} built a {v} tower."),
    ),
    Attribute(
        "festival",
        ("What is the festival of {n} about?", "What festival is held in {n}?", "Which festival does {n} have?",
         "What do people in {n} celebrate?"),
        "The festival of {n} is about {v}.", "{n} holds a festival of {v}.",
        ("{s} holds a festival of {v}.", "{s} celebrates {v} each year.", "{s} has a festival of {v}."),
    ),
)  # fmt: skip
