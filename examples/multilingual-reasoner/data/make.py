"""Write train.jsonl and held_out.jsonl: short questions, reasoned about in six languages.

    python examples/multilingual-reasoner/data/make.py

Rows have the schema of HuggingFaceH4/Multilingual-Thinking. Every sentence comes from a table of
facts and one template a language, so that articles, cases and genders are right by construction.
The user asks in English or in the reasoning language; the answer is in the user's language.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

# fmt: off
LANGUAGES = ["English", "German", "French", "Spanish", "Italian", "Portuguese"]
NUM_HELD_OUT_EACH = 7
DEVELOPERS = [
    "Answer briefly.",
    "You are a friendly tutor.",
    "Answer in one sentence.",
    "You help pupils with short questions.",
]

# English, then "of X" and the capital in each language.
CAPITALS = """
Austria,Vienna|von Österreich,Wien|de l'Autriche,Vienne|de Austria,Viena|dell'Austria,Vienna|da Áustria,Viena
Portugal,Lisbon|von Portugal,Lissabon|du Portugal,Lisbonne|de Portugal,Lisboa|del Portogallo,Lisbona|de Portugal,Lisboa
Italy,Rome|von Italien,Rom|de l'Italie,Rome|de Italia,Roma|dell'Italia,Roma|da Itália,Roma
Japan,Tokyo|von Japan,Tokio|du Japon,Tokyo|de Japón,Tokio|del Giappone,Tokyo|do Japão,Tóquio
Egypt,Cairo|von Ägypten,Kairo|de l'Égypte,Le Caire|de Egipto,El Cairo|dell'Egitto,Il Cairo|do Egito,o Cairo
Canada,Ottawa|von Kanada,Ottawa|du Canada,Ottawa|de Canadá,Ottawa|del Canada,Ottawa|do Canadá,Ottawa
Turkey,Ankara|der Türkei,Ankara|de la Turquie,Ankara|de Turquía,Ankara|della Turchia,Ankara|da Turquia,Ancara
Norway,Oslo|von Norwegen,Oslo|de la Norvège,Oslo|de Noruega,Oslo|della Norvegia,Oslo|da Noruega,Oslo
Greece,Athens|von Griechenland,Athen|de la Grèce,Athènes|de Grecia,Atenas|della Grecia,Atene|da Grécia,Atenas
Mexico,Mexico City|von Mexiko,Mexiko-Stadt|du Mexique,Mexico|de México,Ciudad de México|del Messico,Città del Messico|do México,a Cidade do México
Peru,Lima|von Peru,Lima|du Pérou,Lima|de Perú,Lima|del Perù,Lima|do Peru,Lima
Chile,Santiago|von Chile,Santiago|du Chili,Santiago|de Chile,Santiago|del Cile,Santiago|do Chile,Santiago
Sweden,Stockholm|von Schweden,Stockholm|de la Suède,Stockholm|de Suecia,Estocolmo|della Svezia,Stoccolma|da Suécia,Estocolmo
Ireland,Dublin|von Irland,Dublin|de l'Irlande,Dublin|de Irlanda,Dublín|dell'Irlanda,Dublino|da Irlanda,Dublin
Hungary,Budapest|von Ungarn,Budapest|de la Hongrie,Budapest|de Hungría,Budapest|dell'Ungheria,Budapest|da Hungria,Budapeste
Denmark,Copenhagen|von Dänemark,Kopenhagen|du Danemark,Copenhague|de Dinamarca,Copenhague|della Danimarca,Copenaghen|da Dinamarca,Copenhague
"""
CAPITAL = {
    "English": ("What is the capital of {of}?", "This asks for the capital of {of}. It is {city}.", "The capital of {of} is {city}."),
    "German": ("Was ist die Hauptstadt {of}?", "Gefragt ist die Hauptstadt {of}. Das ist {city}", "Die Hauptstadt {of} ist {city}."),
    "French": ("Quelle est la capitale {of} ?", "On me demande la capitale {of}. C'est {city}", "La capitale {of} est {city}."),
    "Spanish": ("¿Cuál es la capital {of}?", "Me preguntan por la capital {of}. Es {city}", "La capital {of} es {city}."),
    "Italian": ("Qual è la capitale {of}?", "Mi viene chiesta la capitale {of}. È {city}", "La capitale {of} è {city}."),
    "Portuguese": ("Qual é a capital {of}?", "A pergunta é sobre a capital {of}. É {city}", "A capital {of} é {city}."),
}
IN_ENGLISH = {
    "German": ", auf Englisch „{}“",
    "French": ", en anglais « {} »",
    "Spanish": ", en inglés «{}»",
    "Italian": ", in inglese «{}»",
    "Portuguese": ", em inglês «{}»",
}

# Things in the plural; French with de or d', Romance languages with the right "how many".
THINGS = """
apples|Äpfel|de pommes|¿Cuántas manzanas|Quante mele|Quantas maçãs
books|Bücher|de livres|¿Cuántos libros|Quanti libri|Quantos livros
eggs|Eier|d'œufs|¿Cuántos huevos|Quante uova|Quantos ovos
flowers|Blumen|de fleurs|¿Cuántas flores|Quanti fiori|Quantas flores
letters|Briefe|de lettres|¿Cuántas cartas|Quante lettere|Quantas cartas
chairs|Stühle|de chaises|¿Cuántas sillas|Quante sedie|Quantas cadeiras
"""
NAMES = ["Anna", "Clara", "Laura", "Elena", "Sara", "Emma"]
GETS = {  # question, analysis, answer
    "English": ("{name} has {a} {n} and gets {b} more. How many {n} does she have now?", "{name} starts with {a} and gets {b} more, so I add: {a} + {b} = {c}.", "{name} now has {c} {n}."),
    "German": ("{name} hat {a} {n} und bekommt {b} dazu. Wie viele {n} hat sie jetzt?", "{name} hat zuerst {a} und bekommt {b} dazu, also addiere ich: {a} + {b} = {c}.", "{name} hat jetzt {c} {n}."),
    "French": ("{name} a {a} {n} et en reçoit {b} de plus. Combien {of} a-t-elle maintenant ?", "{name} en a d'abord {a} et en reçoit {b} de plus, donc j'additionne : {a} + {b} = {c}.", "{name} a maintenant {c} {n}."),
    "Spanish": ("{name} tiene {a} {n} y recibe {b} más. {many} tiene ahora?", "{name} tiene primero {a} y recibe {b} más, así que sumo: {a} + {b} = {c}.", "{name} tiene ahora {c} {n}."),
    "Italian": ("{name} ha {a} {n} e ne riceve altri {b}. {many} ha adesso?", "{name} all'inizio ne ha {a} e ne riceve ancora {b}, quindi sommo: {a} + {b} = {c}.", "{name} adesso ha {c} {n}."),
    "Portuguese": ("{name} tem {a} {n} e recebe mais {b}. {many} tem agora?", "{name} tem primeiro {a} e recebe mais {b}, por isso somo: {a} + {b} = {c}.", "{name} tem agora {c} {n}."),
}
GIVES = {
    "English": ("{name} has {a} {n} and gives {b} away. How many {n} are left?", "{name} has {a} and gives {b} away, so I subtract: {a} − {b} = {c}.", "{name} has {c} {n} left."),
    "German": ("{name} hat {a} {n} und verschenkt {b} davon. Wie viele {n} bleiben ihr?", "{name} hat {a} und verschenkt {b} davon, also subtrahiere ich: {a} − {b} = {c}.", "{name} bleiben noch {c} {n}."),
    "French": ("{name} a {a} {n} et en donne {b}. Combien {of} lui reste-t-il ?", "{name} en a {a} et en donne {b}, donc je soustrais : {a} − {b} = {c}.", "Il lui reste {c} {n}."),
    "Spanish": ("{name} tiene {a} {n} y regala {b}. {many} le quedan?", "{name} tiene {a} y regala {b}, así que resto: {a} − {b} = {c}.", "Le quedan {c} {n}."),
    "Italian": ("{name} ha {a} {n} e ne regala {b}. {many} le restano?", "{name} ne ha {a} e ne regala {b}, quindi sottraggo: {a} − {b} = {c}.", "Le restano {c} {n}."),
    "Portuguese": ("{name} tem {a} {n} e oferece {b}. {many} lhe restam?", "{name} tem {a} e oferece {b}, por isso subtraio: {a} − {b} = {c}.", "Restam-lhe {c} {n}."),
}
BOXES = {
    "English": ("There are {a} boxes with {b} {n} in each. How many {n} is that?", "{a} boxes hold {b} each, so I multiply: {a} × {b} = {c}.", "That is {c} {n}."),
    "German": ("In {a} Kisten sind je {b} {n}. Wie viele {n} sind das?", "{a} Kisten mit je {b} Stück, also multipliziere ich: {a} × {b} = {c}.", "Das sind {c} {n}."),
    "French": ("Il y a {a} boîtes avec {b} {n} dans chacune. Combien {of} y a-t-il ?", "{a} boîtes en contiennent chacune {b}, donc je multiplie : {a} × {b} = {c}.", "Il y a {c} {n}."),
    "Spanish": ("Hay {a} cajas con {b} {n} en cada una. {many} hay?", "{a} cajas contienen {b} cada una, así que multiplico: {a} × {b} = {c}.", "Hay {c} {n}."),
    "Italian": ("Ci sono {a} scatole con {b} {n} ciascuna. {many} ci sono?", "{a} scatole ne contengono {b} ciascuna, quindi moltiplico: {a} × {b} = {c}.", "Ci sono {c} {n}."),
    "Portuguese": ("Há {a} caixas com {b} {n} em cada uma. {many} há?", "{a} caixas contêm {b} cada uma, por isso multiplico: {a} × {b} = {c}.", "Há {c} {n}."),
}

# factor, then "one of the large", the large ones, the small ones; Romance: "how many" + small ones.
UNITS = """
60|An hour,hours,minutes|Eine Stunde,Stunden,Minuten|Une heure,heures,de minutes|Una hora,horas,¿Cuántos minutos|Un'ora,ore,Quanti minuti|Uma hora,horas,Quantos minutos
7|A week,weeks,days|Eine Woche,Wochen,Tage|Une semaine,semaines,de jours|Una semana,semanas,¿Cuántos días|Una settimana,settimane,Quanti giorni|Uma semana,semanas,Quantos dias
12|A year,years,months|Ein Jahr,Jahre,Monate|Une année,années,de mois|Un año,años,¿Cuántos meses|Un anno,anni,Quanti mesi|Um ano,anos,Quantos meses
24|A day,days,hours|Ein Tag,Tage,Stunden|Un jour,jours,d'heures|Un día,días,¿Cuántas horas|Un giorno,giorni,Quante ore|Um dia,dias,Quantas horas
100|A metre,metres,centimetres|Ein Meter,Meter,Zentimeter|Un mètre,mètres,de centimètres|Un metro,metros,¿Cuántos centímetros|Un metro,metri,Quanti centimetri|Um metro,metros,Quantos centímetros
1000|A kilometre,kilometres,metres|Ein Kilometer,Kilometer,Meter|Un kilomètre,kilomètres,de mètres|Un kilómetro,kilómetros,¿Cuántos metros|Un chilometro,chilometri,Quanti metri|Um quilómetro,quilómetros,Quantos metros
1000|A kilogram,kilograms,grams|Ein Kilogramm,Kilogramm,Gramm|Un kilogramme,kilogrammes,de grammes|Un kilogramo,kilogramos,¿Cuántos gramos|Un chilogrammo,chilogrammi,Quanti grammi|Um quilograma,quilogramas,Quantos gramas
"""
UNIT = {
    "English": ("How many {small} are there in {a} {large}?", "{one} has {f} {small}, so {a} × {f} = {c}.", "{a} {large} are {c} {small}."),
    "German": ("Wie viele {small} sind {a} {large}?", "{one} hat {f} {small}, also {a} × {f} = {c}.", "{a} {large} sind {c} {small}."),
    "French": ("Combien {of} y a-t-il dans {a} {large} ?", "{one} compte {f} {small}, donc {a} × {f} = {c}.", "{a} {large} font {c} {small}."),
    "Spanish": ("{many} hay en {a} {large}?", "{one} tiene {f} {small}, así que {a} × {f} = {c}.", "{a} {large} son {c} {small}."),
    "Italian": ("{many} ci sono in {a} {large}?", "{one} ha {f} {small}, quindi {a} × {f} = {c}.", "{a} {large} sono {c} {small}."),
    "Portuguese": ("{many} há em {a} {large}?", "{one} tem {f} {small}, por isso {a} × {f} = {c}.", "{a} {large} são {c} {small}."),
}

OPPOSITES = """
hot,cold|heiß,kalt|chaud,froid|caliente,frío|caldo,freddo|quente,frio
big,small|groß,klein|grand,petit|grande,pequeño|grande,piccolo|grande,pequeno
old,new|alt,neu|vieux,neuf|viejo,nuevo|vecchio,nuovo|velho,novo
high,low|hoch,niedrig|haut,bas|alto,bajo|alto,basso|alto,baixo
full,empty|voll,leer|plein,vide|lleno,vacío|pieno,vuoto|cheio,vazio
open,closed|offen,geschlossen|ouvert,fermé|abierto,cerrado|aperto,chiuso|aberto,fechado
rich,poor|reich,arm|riche,pauvre|rico,pobre|ricco,povero|rico,pobre
strong,weak|stark,schwach|fort,faible|fuerte,débil|forte,debole|forte,fraco
easy,difficult|leicht,schwer|facile,difficile|fácil,difícil|facile,difficile|fácil,difícil
clean,dirty|sauber,schmutzig|propre,sale|limpio,sucio|pulito,sporco|limpo,sujo
"""
OPPOSITE = {
    "English": ("What is the opposite of “{a}”?", "I need the word that means the contrary of “{a}”. That is “{b}”.", "The opposite of “{a}” is “{b}”."),
    "German": ("Was ist das Gegenteil von „{a}“?", "Ich suche das Wort, das das Gegenteil von „{a}“ bedeutet. Das ist „{b}“", "Das Gegenteil von „{a}“ ist „{b}“."),
    "French": ("Quel est le contraire de « {a} » ?", "Je cherche le mot qui signifie le contraire de « {a} ». C'est « {b} »", "Le contraire de « {a} » est « {b} »."),
    "Spanish": ("¿Qué es lo contrario de «{a}»?", "Busco la palabra que significa lo contrario de «{a}». Es «{b}»", "Lo contrario de «{a}» es «{b}»."),
    "Italian": ("Qual è il contrario di «{a}»?", "Cerco la parola che significa il contrario di «{a}». È «{b}»", "Il contrario di «{a}» è «{b}»."),
    "Portuguese": ("Qual é o contrário de «{a}»?", "Procuro a palavra que significa o contrário de «{a}». É «{b}»", "O contrário de «{a}» é «{b}»."),
}

DAYS = {
    "English": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "German": "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
    "French": "lundi mardi mercredi jeudi vendredi samedi dimanche",
    "Spanish": "lunes martes miércoles jueves viernes sábado domingo",
    "Italian": "lunedì martedì mercoledì giovedì venerdì sabato domenica",
    "Portuguese": "segunda-feira terça-feira quarta-feira quinta-feira sexta-feira sábado domingo",
}
MONTHS = {
    "English": "January February March April May June July August September October November December",
    "German": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "French": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "Spanish": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "Italian": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
    "Portuguese": "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro",
}
DAY = {  # after {a} comes {b}; {x} is the day before {a}
    "English": ("Which day comes after {a}?", "The days in order are {x}, {a}, {b}. So {b} comes after {a}.", "After {a} comes {b}."),
    "German": ("Welcher Tag kommt nach {a}?", "Die Tage sind der Reihe nach {x}, {a}, {b}. Nach {a} kommt also {b}", "Nach {a} kommt {b}."),
    "French": ("Quel jour vient après {a} ?", "Les jours sont, dans l'ordre, {x}, {a}, {b}. Après {a} vient donc {b}", "Après {a} vient {b}."),
    "Spanish": ("¿Qué día viene después del {a}?", "Los días, en orden, son {x}, {a}, {b}. Después del {a} viene, pues, el {b}", "Después del {a} viene el {b}."),
    "Italian": ("Quale giorno viene dopo {a}?", "I giorni, in ordine, sono {x}, {a}, {b}. Dopo {a} viene quindi {b}", "Dopo {a} viene {b}."),
    "Portuguese": ("Que dia vem depois de {a}?", "Os dias, por ordem, são {x}, {a}, {b}. Depois de {a} vem, portanto, {b}", "Depois de {a} vem {b}."),
}
MONTH = {  # before {a} comes {b}; {x} follows {a}
    "English": ("Which month comes before {a}?", "The months in order are {b}, {a}, {x}. So {b} comes before {a}.", "Before {a} comes {b}."),
    "German": ("Welcher Monat kommt vor dem {a}?", "Die Monate sind der Reihe nach {b}, {a}, {x}. Vor dem {a} kommt also der {b}", "Vor dem {a} kommt der {b}."),
    "French": ("Quel mois vient avant {a} ?", "Les mois sont, dans l'ordre, {b}, {a}, {x}. Avant {a} vient donc {b}", "Avant {a} vient {b}."),
    "Spanish": ("¿Qué mes viene antes de {a}?", "Los meses, en orden, son {b}, {a}, {x}. Antes de {a} viene, pues, {b}", "Antes de {a} viene {b}."),
    "Italian": ("Quale mese viene prima di {a}?", "I mesi, in ordine, sono {b}, {a}, {x}. Prima di {a} viene quindi {b}", "Prima di {a} viene {b}."),
    "Portuguese": ("Que mês vem antes de {a}?", "Os meses, por ordem, são {b}, {a}, {x}. Antes de {a} vem, portanto, {b}", "Antes de {a} vem {b}."),
}

SORT = {
    "English": ("Sort these numbers from smallest to largest: {given}.", "The smallest number is {a}, the largest is {c}, and {b} lies between them.", "In order: {a}, {b}, {c}."),
    "German": ("Sortiere diese Zahlen von der kleinsten zur größten: {given}.", "Die kleinste Zahl ist {a}, die größte ist {c}, und {b} liegt dazwischen.", "Der Reihe nach: {a}, {b}, {c}."),
    "French": ("Classe ces nombres du plus petit au plus grand : {given}.", "Le plus petit nombre est {a}, le plus grand est {c}, et {b} se trouve entre les deux.", "Dans l'ordre : {a}, {b}, {c}."),
    "Spanish": ("Ordena estos números de menor a mayor: {given}.", "El número menor es {a}, el mayor es {c}, y {b} está en medio.", "En orden: {a}, {b}, {c}."),
    "Italian": ("Ordina questi numeri dal più piccolo al più grande: {given}.", "Il numero più piccolo è {a}, il più grande è {c}, e {b} sta in mezzo.", "In ordine: {a}, {b}, {c}."),
    "Portuguese": ("Ordena estes números do menor para o maior: {given}.", "O número menor é {a}, o maior é {c}, e {b} fica no meio.", "Por ordem: {a}, {b}, {c}."),
}
PARITY = {  # question, analysis if even, if odd, answer if even, if odd
    "English": ("Is {a} even or odd?", "{a} divided by 2 leaves no remainder, so it is even.", "{a} divided by 2 leaves a remainder of 1, so it is odd.", "{a} is even.", "{a} is odd."),
    "German": ("Ist {a} gerade oder ungerade?", "{a} lässt sich ohne Rest durch 2 teilen, also ist die Zahl gerade.", "{a} geteilt durch 2 lässt den Rest 1, also ist die Zahl ungerade.", "{a} ist gerade.", "{a} ist ungerade."),
    "French": ("Le nombre {a} est-il pair ou impair ?", "{a} divisé par 2 ne laisse aucun reste, donc le nombre est pair.", "{a} divisé par 2 laisse un reste de 1, donc le nombre est impair.", "Le nombre {a} est pair.", "Le nombre {a} est impair."),
    "Spanish": ("¿El número {a} es par o impar?", "{a} dividido entre 2 no deja resto, así que el número es par.", "{a} dividido entre 2 deja un resto de 1, así que el número es impar.", "El número {a} es par.", "El número {a} es impar."),
    "Italian": ("Il numero {a} è pari o dispari?", "{a} diviso per 2 non dà resto, quindi il numero è pari.", "{a} diviso per 2 dà resto 1, quindi il numero è dispari.", "Il numero {a} è pari.", "Il numero {a} è dispari."),
    "Portuguese": ("O número {a} é par ou ímpar?", "{a} dividido por 2 não deixa resto, por isso o número é par.", "{a} dividido por 2 deixa resto 1, por isso o número é ímpar.", "O número {a} é par.", "O número {a} é ímpar."),
}

# English noun | its translation with the article; m, f or n.
NOUNS = """
house|das Haus,n|la maison,f|la casa,f|la casa,f|a casa,f
tree|der Baum,m|l'arbre,m|el árbol,m|l'albero,m|a árvore,f
moon|der Mond,m|la lune,f|la luna,f|la luna,f|a lua,f
sun|die Sonne,f|le soleil,m|el sol,m|il sole,m|o sol,m
key|der Schlüssel,m|la clé,f|la llave,f|la chiave,f|a chave,f
bread|das Brot,n|le pain,m|el pan,m|il pane,m|o pão,m
window|das Fenster,n|la fenêtre,f|la ventana,f|la finestra,f|a janela,f
milk|die Milch,f|le lait,m|la leche,f|il latte,m|o leite,m
"""
NOUN = {
    "German": ("„The {en}“ heißt auf Deutsch „{it}“; das Wort ist {gender}.", {"m": "männlich", "f": "weiblich", "n": "sächlich"}),
    "French": ("« The {en} » se dit « {it} » en français ; le mot est {gender}.", {"m": "masculin", "f": "féminin"}),
    "Spanish": ("«The {en}» se dice «{it}» en español; la palabra es {gender}.", {"m": "masculina", "f": "femenina"}),
    "Italian": ("«The {en}» si dice «{it}» in italiano; la parola è {gender}.", {"m": "maschile", "f": "femminile"}),
    "Portuguese": ("«The {en}» diz-se «{it}» em português; a palavra é {gender}.", {"m": "masculina", "f": "feminina"}),
}

# fmt: on


def table(text: str) -> list[list[str]]:
    """Return a table's lines as lists of cells."""
    return [line.split("|") for line in text.strip().splitlines()]


def asked_in_english(language: str, index: int) -> bool:
    """Say whether the user asks this one in English: every second question does."""
    return language == "English" or (index + LANGUAGES.index(language)) % 2 == 0


def closed(analysis: str, language: str, english: str | None) -> str:
    """End an analysis: with the English word for an English answer, where it is another word."""
    if language == "English":
        return analysis
    return analysis + (IN_ENGLISH[language].format(english) if english else "") + "."


def capitals(language: str):
    """Yield questions for capitals."""
    for index, cells in enumerate(table(CAPITALS)):
        english = asked_in_english(language, index)
        own = dict(zip(("of", "city"), cells[LANGUAGES.index(language)].split(","), strict=True))
        theirs = dict(zip(("of", "city"), cells[0].split(","), strict=True)) if english else own
        ask, _, answer = CAPITAL["English" if english else language]
        other = theirs["city"] if own["city"] != theirs["city"] else None
        analysis = closed(CAPITAL[language][1].format(**own), language, other)
        yield ask.format(**theirs), analysis, answer.format(**theirs)


def plural(cell: str) -> dict[str, str]:
    """Return a noun as {n}, with {of} (French: de pommes) and {many} (Spanish: ¿Cuántas …)."""
    bare = cell.removeprefix("de ").removeprefix("d'")
    for word in ("¿Cuántas ", "¿Cuántos ", "Quante ", "Quanti ", "Quantas ", "Quantos "):
        bare = bare.removeprefix(word)
    return {"n": bare, "of": cell, "many": cell}


def sums(language: str):
    """Yield small sums, told as stories."""
    kinds = [
        (GETS, [(7, 5), (12, 6), (9, 8), (15, 4), (23, 10), (6, 11)], lambda a, b: a + b),
        (GIVES, [(14, 6), (9, 4), (20, 7), (18, 9), (11, 5), (30, 12)], lambda a, b: a - b),
        (BOXES, [(4, 6), (3, 8), (5, 7), (6, 9), (8, 5), (7, 4)], lambda a, b: a * b),
    ]
    things = table(THINGS)
    own = LANGUAGES.index(language)
    for kind, (texts, pairs, result) in enumerate(kinds):
        for index, (a, b) in enumerate(pairs):
            # Each language counts other things, so that no two ask the same in English.
            shift = (index + own) % len(things)
            cells = things[shift]
            english = asked_in_english(language, index + kind)
            figures = {"a": a, "b": b, "c": result(a, b), "name": NAMES[(index + own) % len(NAMES)]}
            asks = "English" if english else language
            theirs = figures | plural(cells[LANGUAGES.index(asks)])
            question = texts[asks][0].format(**theirs)
            if asks == "Italian" and cells[own].startswith("Quante"):
                question = question.replace("altri", "altre")
            analysis = texts[language][1].format(**figures)
            yield question, analysis, texts[asks][2].format(**theirs)


def units(language: str):
    """Yield conversions of units."""
    own = LANGUAGES.index(language)
    for index, (factor, *cells) in enumerate(table(UNITS)):
        english = asked_in_english(language, index)
        asks = "English" if english else language
        a = 2 + (index + own) % 6

        def words(which: str, cells: list[str] = cells) -> dict[str, str]:
            one, large, small = cells[LANGUAGES.index(which)].split(",")
            return {"one": one, "large": large, "small": plural(small)["n"], **plural(small)}

        figures = {"a": a, "f": factor, "c": a * int(factor)}
        question = UNIT[asks][0].format(**figures, **words(asks))
        analysis = UNIT[language][1].format(**figures, **words(language))
        yield question, analysis, UNIT[asks][2].format(**figures, **words(asks))


def opposites(language: str):
    """Yield questions for opposites."""
    for index, cells in enumerate(table(OPPOSITES)):
        english = asked_in_english(language, index)
        own = dict(zip("ab", cells[LANGUAGES.index(language)].split(","), strict=True))
        theirs = dict(zip("ab", cells[0].split(","), strict=True)) if english else own
        ask, _, answer = OPPOSITE["English" if english else language]
        other = theirs["b"] if english and language != "English" else None
        analysis = closed(OPPOSITE[language][1].format(**own), language, other)
        yield ask.format(**theirs), analysis, answer.format(**theirs)


def neighbours(language: str):
    """Yield questions for the next day and the month before."""
    for texts, names, step in ((DAY, DAYS, 1), (MONTH, MONTHS, -1)):
        count = len(names["English"].split())
        for index in range(0, count, 1 if step == 1 else 2):
            english = asked_in_english(language, index // (1 if step == 1 else 2))
            asks = "English" if english else language

            def words(
                which: str, at: int = index, by: int = step, all_names=names
            ) -> dict[str, str]:
                cells = all_names[which].split()
                size = len(cells)
                return {"x": cells[(at - by) % size], "a": cells[at], "b": cells[(at + by) % size]}

            theirs = words(asks)
            other = theirs["b"] if english and language != "English" else None
            analysis = closed(texts[language][1].format(**words(language)), language, other)
            yield texts[asks][0].format(**theirs), analysis, texts[asks][2].format(**theirs)


def sorted_numbers(language: str):
    """Yield three numbers to sort."""
    own = LANGUAGES.index(language)
    triples = [(8, 3, 5), (21, 34, 13), (70, 7, 17), (45, 54, 9), (100, 10, 60), (31, 28, 29)]
    for index, triple in enumerate(triples):
        given = [number + own * 2 for number in triple]
        a, b, c = sorted(given)
        asks = "English" if asked_in_english(language, index) else language
        figures = {"given": ", ".join(map(str, given)), "a": a, "b": b, "c": c}
        yield tuple(
            texts.format(**figures) for texts in (SORT[asks][0], SORT[language][1], SORT[asks][2])
        )


def parities(language: str):
    """Yield numbers that are even or odd."""
    own = LANGUAGES.index(language)
    for index, start in enumerate((14, 27, 38, 53, 90)):
        number = start + own * 3
        asks = "English" if asked_in_english(language, index) else language
        odd = number % 2
        yield tuple(
            text.format(a=number)
            for text in (PARITY[asks][0], PARITY[language][1 + odd], PARITY[asks][3 + odd])
        )


def nouns(language: str):
    """Yield words to translate from English."""
    if language == "English":
        return
    text, genders = NOUN[language]
    for cells in table(NOUNS):
        translated, gender = cells[LANGUAGES.index(language)].split(",")
        analysis = text.format(en=cells[0], it=translated, gender=genders[gender])
        yield (
            f"How do you say “the {cells[0]}” in {language}?",
            analysis,
            f"In {language}, “the {cells[0]}” is “{translated}”.",
        )


def row(language: str, index: int, user: str, analysis: str, final: str) -> dict:
    """Return one row in the schema of Multilingual-Thinking."""
    developer = DEVELOPERS[index % len(DEVELOPERS)]
    return {
        "reasoning_language": language,
        "developer": developer,
        "user": user,
        "analysis": analysis,
        "final": final,
        "messages": [
            {
                "content": f"reasoning language: {language}\n\n{developer}",
                "role": "system",
                "thinking": None,
            },
            {"content": user, "role": "user", "thinking": None},
            {"content": final, "role": "assistant", "thinking": analysis},
        ],
    }


def order(record: dict) -> str:
    """Return a fixed, random-looking place for a row, that later rows don't change."""
    return hashlib.sha256(f"{record['reasoning_language']}\0{record['user']}".encode()).hexdigest()


def main() -> None:
    """Write both files beside this script."""
    folder = Path(__file__).parent
    kinds = [capitals, sums, units, opposites, neighbours, sorted_numbers, parities, nouns]
    everything = [
        row(language, index, *triple)
        for language in LANGUAGES
        for index, triple in enumerate(triple for kind in kinds for triple in kind(language))
    ]
    asked = Counter(record["user"] for record in everything)
    train, held_out = [], []
    for language in LANGUAGES:
        rows = sorted((r for r in everything if r["reasoning_language"] == language), key=order)
        # Nobody asks a held-out question in training, not even to be reasoned about elsewise.
        alone = [record for record in rows if asked[record["user"]] == 1]
        held_out += alone[:NUM_HELD_OUT_EACH]
        train += [record for record in rows if record not in alone[:NUM_HELD_OUT_EACH]]
    for name, rows in (("train", train), ("held_out", held_out)):
        lines = [json.dumps(r, ensure_ascii=False) for r in sorted(rows, key=order)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
