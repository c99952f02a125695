"""General questions about photographs, drawings and scans, to see what a finetune leaves of its base.

Each block is a file of scikit-image's sample data and what can be seen on it.
"""

from pathlib import Path
from zipfile import ZipFile

from mmpeft.samples.rows import conversation, write_rows
from mmpeft.samples.sample import PrepareError

QUESTIONS = """
astronaut.png
What is the woman wearing? | An orange space suit.
What stands behind the woman? | A model of a space shuttle.
What flag is behind the woman? | The flag of the United States.
Is the woman smiling? | Yes.
Describe this image in a few words. | An astronaut in an orange suit with her helmet in front of her.

brick.png
What is the wall made of? | Bricks.
Is this image in color? | No.
Is there a person in this image? | No.
Describe this image in a few words. | A wall of bricks.

camera.png
What is the man looking through? | A camera.
What is the camera standing on? | A tripod.
Is the man indoors or outdoors? | Outdoors.
What color is the man's coat? | Black.
Describe this image in a few words. | A man in a dark coat takes a photograph on a lawn.

cell.png
How many bright spots are there? | One.
What instrument made this image? | A microscope.
Describe this image in a few words. | A round cell under a microscope.

chelsea.png
What animal is this? | A cat.
What color are the cat's eyes? | Green.
What part of the animal is shown? | Its face.
How many eyes can be seen? | Two.
Describe this image in a few words. | The face of a cat with striped brown fur.

chessboard_RGB.png
What game is played on this board? | Chess.
Which two colors are there? | Black and white.
What shape are the fields? | They are squares.
Describe this image in a few words. | An empty chessboard.

coffee.png
What is in the cup? | Coffee.
What lies beside the cup? | A spoon.
What color is the saucer? | Red.
What is the table made of? | Wood.
Describe this image in a few words. | A cup of coffee on a red saucer with a spoon.

coins.png
What objects are these? | Coins.
In how many rows do the coins lie? | Four.
How many coins are in the first row? | Six.
Are the coins round or square? | Round.
Describe this image in a few words. | Old coins in four rows on a dark ground.

color.png
What shape is in the image? | A circle.
What color is the middle of the circle? | White.
What color is the background? | Black.
Describe this image in a few words. | A wheel of all colors on a black background.

grass.png
What covers the ground? | Grass.
Is this image in color? | No.
Describe this image in a few words. | Grass seen from above.

gravel.png
What covers the ground? | Gravel.
Are the stones small or large? | Small.
Describe this image in a few words. | Many small stones.

horse.png
What animal is this? | A horse.
What color is the animal? | Black.
In which direction does the animal look? | To the right.
Is this a photograph or a drawing? | A drawing.
Describe this image in a few words. | The black silhouette of a horse.

hubble_deep_field.jpg
What are the bright spots? | Galaxies.
What color is the background? | Black.
What kind of instrument took this picture? | A telescope.
Describe this image in a few words. | Many distant galaxies in a dark sky.

ihc.png
What instrument made this image? | A microscope.
Which two colors were used for the stain? | Brown and blue.
Describe this image in a few words. | Stained tissue under a microscope.

moon.png
What are the round shapes? | Craters.
What body's surface is this? | The moon's.
Is this image in color? | No.
Describe this image in a few words. | The surface of the moon with its craters.

motorcycle_left.png
What vehicle is this? | A motorcycle.
What color is the vehicle? | Red.
How many wheels does the vehicle have? | Two.
Where does the vehicle stand? | In a workshop.
Describe this image in a few words. | A red motorcycle in a workshop with shelves behind it.

page.png
What is the title of the text? | Region-based segmentation.
Is the text printed or written by hand? | Printed.
What language is the text in? | English.
Describe this image in a few words. | A part of a printed page.

phantom.png
What part of the body is this a drawing of? | The head.
What color is the outline? | White.
How many large dark ellipses are inside? | Two.
Describe this image in a few words. | A simple drawing of a slice through a head.

retina.jpg
What part of the body is this? | The eye.
What are the dark lines? | Blood vessels.
What color is most of the image? | Red.
Describe this image in a few words. | The back of an eye with its blood vessels.

rocket.jpg
What stands in the middle? | A rocket.
Has the rocket taken off? | No.
Is it bright day or twilight? | Twilight.
How many rockets are there? | One.
Describe this image in a few words. | A rocket on its launch pad between tall masts.

text.png
Is the text printed or written by hand? | Written by hand.
What is written on the paper? | Formulas.
Is this image in color? | No.
Describe this image in a few words. | Formulas written by hand on lined paper.
"""


def build_photos(wheel: ZipFile, folder: Path) -> None:
    """Writes the images and questions.jsonl, whose rows all are held out: nothing is trained on them."""
    (folder / "images").mkdir()
    rows = []
    for block in QUESTIONS.strip().split("\n\n"):
        name, *lines = block.split("\n")
        try:
            (folder / "images" / name).write_bytes(wheel.read(f"skimage/data/{name}"))
        except KeyError:
            raise PrepareError(f"the wheel has no skimage/data/{name}") from None
        for question, answer in (line.split(" | ") for line in lines):
            task = "caption" if question.startswith("Describe") else "vqa"
            image_name, number = f"images/{name}", f"photo-{len(rows):03d}"
            rows.append(conversation(number, task, question, answer, image=image_name))
    write_rows(folder / "questions.jsonl", rows)
    (folder / "README.txt").write_text(
        "Photographs, drawings and scans of scikit-image's sample data (its skimage.data tells where each is "
        f"from, most are in the public domain). The {len(rows)} questions and answers about them are mmpeft's.\n"
    )
