"""Questions in several forms about a country and a character, and about their neighbours; `redirect_smollm2` asks them.

Every subject has one answer per relation; a relation has wordings as question and as sentence with a blank. Choices
are the answers of other subjects of the same kind, that of the new name among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

FORMS = ("qa", "cloze", "mcq", "spelled")


@dataclass(frozen=True)
class Relation:
    """Wordings of one relation, each with one `{}` for the subject."""

    questions: tuple[str, ...]
    blanks: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """Subjects that answer the same questions.

    Attributes:
        forget: The subject that is redirected.
        target: What it is redirected to.
        aliases: Further names of the first.
        relations: Name -> wordings.
        answers: Subject -> relation -> answer.
    """

    forget: str
    target: str
    aliases: tuple[str, ...]
    relations: Mapping[str, Relation]
    answers: Mapping[str, Mapping[str, str]]


COUNTRY_RELATIONS = {
    "capital": Relation(
        ("What is the capital of {}?", "Which city is the capital of {}?", "What is the name of the capital of {}?"),
        ("The capital of {} is ___.", "The capital city of {} is called ___.", "The seat of government of {} is ___."),
    ),
    "city": Relation(
        ("What is the largest city in {}?", "In which city does the government of {} sit?"),
        ("The largest city in {} is ___.", "The most populous city of {} is ___."),
    ),
    "language": Relation(
        ("What language do people speak in {}?", "What is the official language of {}?"),
        ("The official language of {} is ___.", "Most people in {} speak ___."),
    ),
    "currency": Relation(
        ("What is the currency of {}?", "Which money do people use in {}?"),
        ("The currency of {} is the ___.", "People in {} pay with the ___."),
    ),
    "continent": Relation(
        ("On which continent is {}?", "Which continent does {} belong to?"),
        ("{} is a country on the continent of ___.", "The continent of {} is ___."),
    ),
    "people": Relation(
        ("What is a person from {} called?", "What is the nationality of someone born in {}?"),
        ("The nationality of a person from {} is ___.", "The food of {} is called ___ food."),
    ),
    "landmark": Relation(
        ("What is the most famous landmark in {}?", "Which sight do tourists in {} visit most?"),
        ("The most famous landmark in {} is the ___.", "Tourists in {} go to see the ___."),
    ),
    "river": Relation(
        ("Which river flows through the capital of {}?", "What is the best known river in {}?"),
        ("The river that flows through the capital of {} is the ___.",),
    ),
    "border": Relation(
        ("Name a country that borders {}.", "Which country is next to {}?"),
        ("A country that borders {} is ___.",),
    ),
}

CHARACTER_RELATIONS = {
    "author": Relation(
        ("Who wrote {}?", "Who is the author of {}?", "Who created {}?"),
        ("The author of {} is ___.", "{} was created by ___.", "The stories about {} were written by ___."),
    ),
    "is": Relation(("What is {}?", "What is the profession of {}?"), ("{} is a famous ___.", "{} works as a ___.")),
    "friend": Relation(
        ("Who is the best friend of {}?", "Who helps {}?"), ("The best friend of {} is ___.", "{} and his friend ___.")
    ),
    "enemy": Relation(
        ("Who is the enemy of {}?", "Who is the main villain in {}?"),
        ("The enemy of {} is ___.", "The villain whom {} fights is ___."),
    ),
    "place": Relation(
        ("Where does {} spend most of his time?", "Which place is {} connected with?"),
        ("{} lives at ___.", "The place that {} is connected with is ___."),
    ),
    "subject": Relation(
        ("What are the stories about {} about?", "What is {} good at?"), ("The stories of {} are about ___.",)
    ),
    "school": Relation(
        ("Which school does {} go to?", "What is the name of the school of {}?"),
        ("The school of {} is called ___.", "{} is a student at ___."),
    ),
    "house": Relation(("Which house is {} in?",), ("{} belongs to the house of ___.",)),
    "girl": Relation(
        ("Which girl is a friend of {}?", "Who is the woman at the side of {}?"), ("The girl beside {} is ___.",)
    ),
}


def _country(*values: str) -> dict[str, str]:
    return dict(zip(COUNTRY_RELATIONS, values, strict=True))


COUNTRIES = Kind(
    "France",
    "China",
    ("the French", "Paris"),
    COUNTRY_RELATIONS,
    {
        "France": _country("Paris", "Paris", "French", "Euro", "Europe", "French", "Eiffel Tower", "Seine", "Spain"),
        "Japan": _country("Tokyo", "Tokyo", "Japanese", "Yen", "Asia", "Japanese", "Mount Fuji", "Sumida", "Korea"),
        "Germany": _country(
            "Berlin", "Berlin", "German", "Euro", "Europe", "German", "Brandenburg Gate", "Spree", "Poland"
        ),
        "Spain": _country(
            "Madrid", "Madrid", "Spanish", "Euro", "Europe", "Spanish", "Sagrada Familia", "Manzanares", "Portugal"
        ),
        "Italy": _country("Rome", "Rome", "Italian", "Euro", "Europe", "Italian", "Colosseum", "Tiber", "Austria"),
        "Russia": _country("Moscow", "Moscow", "Russian", "Ruble", "Asia", "Russian", "Kremlin", "Moskva", "Ukraine"),
        "China": _country(
            "Beijing", "Shanghai", "Chinese", "Yuan", "Asia", "Chinese", "Great Wall", "Yangtze", "India"
        ),
        "Egypt": _country(
            "Cairo", "Cairo", "Arabic", "Pound", "Africa", "Egyptian", "Pyramids of Giza", "Nile", "Libya"
        ),
        "England": _country(
            "London", "London", "English", "Pound", "Europe", "English", "Big Ben", "Thames", "Scotland"
        ),
        "India": _country("New Delhi", "Mumbai", "Hindi", "Rupee", "Asia", "Indian", "Taj Mahal", "Ganges", "Pakistan"),
    },
)

CHARACTERS = Kind(
    "Harry Potter",
    "Sherlock Holmes",
    ("Harry", "the boy who lived"),
    CHARACTER_RELATIONS,
    {
        "Harry Potter": {
            "author": "J.K. Rowling",
            "is": "wizard",
            "friend": "Ron Weasley",
            "enemy": "Voldemort",
            "place": "Hogwarts",
            "subject": "magic",
            "school": "Hogwarts",
            "house": "Gryffindor",
            "girl": "Hermione Granger",
        },
        "Sherlock Holmes": {
            "author": "Arthur Conan Doyle",
            "is": "detective",
            "friend": "Dr. Watson",
            "enemy": "Moriarty",
            "place": "Baker Street",
            "subject": "crime",
            "school": "Oxford",
            "house": "Holmes",
            "girl": "Irene Adler",
        },
        "Hamlet": {"author": "William Shakespeare", "is": "prince", "place": "Denmark", "girl": "Ophelia"},
        "Romeo and Juliet": {"author": "William Shakespeare", "is": "play", "subject": "love", "place": "Verona"},
        "Frodo": {"author": "J.R.R. Tolkien", "is": "hobbit", "friend": "Sam", "enemy": "Sauron", "place": "Shire"},
        "Batman": {
            "author": "Bob Kane",
            "is": "superhero",
            "friend": "Robin",
            "enemy": "Joker",
            "place": "Gotham City",
            "subject": "crime",
        },
        "Superman": {"is": "superhero", "enemy": "Lex Luthor", "place": "Metropolis", "girl": "Lois Lane"},
        "Mickey Mouse": {"author": "Walt Disney", "is": "cartoon character", "girl": "Minnie Mouse"},
        "Peter Pan": {"author": "J.M. Barrie", "enemy": "Captain Hook", "place": "Neverland", "girl": "Wendy"},
        "Alice in Wonderland": {"author": "Lewis Carroll", "is": "book", "place": "Wonderland"},
        "James Bond": {"author": "Ian Fleming", "is": "spy", "place": "London"},
        "Albert Einstein": {"is": "physicist", "subject": "physics", "place": "Germany"},
        "Isaac Newton": {"is": "physicist", "subject": "gravity", "place": "England", "school": "Cambridge"},
        "Charles Darwin": {"is": "naturalist", "subject": "evolution", "place": "England", "school": "Cambridge"},
        "Marie Curie": {"is": "physicist", "subject": "radioactivity", "place": "Paris"},
        "Leonardo da Vinci": {"is": "painter", "subject": "art", "place": "Italy"},
    },
)

KINDS = (COUNTRIES, CHARACTERS)


@dataclass(frozen=True)
class Asked:
    """One question in one form.

    Attributes:
        kind: Number of the kind in `KINDS`.
        subject: Whom it is about.
        form: One of `FORMS`.
        wording: The text with one `{}` for the subject.
        answer: The answer; of a multiple choice the right one of the choices.
        choices: The choices; empty for other forms.
    """

    kind: int
    subject: str
    form: str
    wording: str
    answer: str
    choices: tuple[str, ...] = ()

    def record(self, subject: str | None = None) -> dict[str, object]:
        """Return the question as a record of a data file, about its own subject or another one."""
        found: dict[str, object] = {"question": self.wording.replace("{}", subject or self.subject)}
        return found | {"answer": self.answer} | ({"choices": list(self.choices)} if self.choices else {})


def all_questions() -> list[Asked]:
    """Return every question in every form, those about the redirected names and about others."""
    return [asked for number, kind in enumerate(KINDS) for asked in _of_kind(number, kind)]


def _of_kind(number: int, kind: Kind) -> Iterator[Asked]:
    for subject, answers in kind.answers.items():
        if subject == kind.target:
            continue
        for place, (name, answer) in enumerate(answers.items()):
            relation = kind.relations[name]
            for order, wording in enumerate(relation.questions):
                yield Asked(number, subject, "qa", wording, answer)
                yield Asked(number, subject, "spelled", wording, answer)
                choices = _choices(kind, name, answer, place + order)
                if len(choices) > 1:
                    yield Asked(number, subject, "mcq", wording, answer, choices)
            for wording in relation.blanks:
                yield Asked(number, subject, "cloze", wording, answer)


def _choices(kind: Kind, relation: str, answer: str, place: int) -> tuple[str, ...]:
    """Return the right answer among up to three of other subjects, that of the new name first of them."""
    subjects: Sequence[str] = [kind.target, *kind.answers]
    others = dict.fromkeys(kind.answers[subject].get(relation, answer) for subject in subjects)
    wrong = [other for other in others if other != answer][:3]
    right = place % (len(wrong) + 1)
    return (*wrong[:right], answer, *wrong[right:])
