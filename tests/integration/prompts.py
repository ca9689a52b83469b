"""Fifty prompts of different lengths, written for these tests: some share a beginning, some fill many blocks."""

BEGINNINGS = """\
Once upon a time there was a little fox who lived in the forest.
The old king had three daughters, and the youngest
"Where are you going?" asked the rabbit.
It was raining, and the children stayed inside to
A brave little boat sailed across the big blue lake until
Tom had a red ball. He loved to
In the middle of the night the clock struck twelve and
The cat sat on the wall and looked at the moon. She thought
One day, a girl named Lily found a shiny stone in the garden.
There was once a poor woodcutter who lived with his wife and
The wind blew hard, the trees bent low, and the small bird
"Please, can I have one more story?" said Sam. His mother
Far away, where the river meets the sea, there stood
The giant was so tall that his head
Mia and Ben went to the park with their dog. They saw
Long ago, when wishes still came true,
The baker made bread every morning, and every morning
A mouse lived under the floor of an old house. One evening
"I am not afraid," said the boy, but
When spring came, the snow melted and the first flowers
The teacher smiled at the class and said,
Two friends walked along the road. The first one carried
The little train puffed up the hill. It said to itself,
Grandmother put on her glasses, opened the big book, and
On the top of the highest mountain
The princess did not want to marry. She told her father
A frog jumped out of the pond and
Anna was sad because her kite was
The lion was the king of all animals, yet
It was the day before Christmas, and
"Look!" cried Jack. "There is something in the
The shoemaker worked all day and all night, but
Every evening the moon came to the window and told
Once there was a tree that could talk. It
The duck had five yellow ducklings. The smallest one
He opened the door slowly. Inside the room there was
The queen looked into her mirror and asked
Max wanted to build a house of
A fairy came flying through the window. She was no bigger than
The boys ran down to the river, where""".splitlines()

LONG = [
    " ".join(BEGINNINGS[start : start + count])
    for start, count in ((0, 4), (3, 6), (8, 8), (0, 10), (15, 5), (20, 12), (0, 9), (30, 10), (5, 20), (1, 3))
]

PROMPTS = BEGINNINGS + LONG
assert len(PROMPTS) == 50
