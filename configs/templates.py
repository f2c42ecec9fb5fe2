"""Prompt texts for data.template: plain strings in which {problem} stands for the problem and other braces for themselves.

| template | data.chat | reward.pattern | for |
|---|---|---|---|
| BOXED | True | "boxed" | instruct models: the chat template wraps it as the user's message |
| BASE_BOXED | False | "boxed" | base models, without examples |
| ANSWER | True or False | "answer" | "Answer: x" on the last line, as in DAPO |
| GSM8K_FEWSHOT | False | "first_hashes" | base models on GSM8K: four examples of our own, then the question |

A base model that was shown examples goes on to invent the next question; "first_hashes" grades what it said to ours. Any other
text does as well: c.data.template = "Q: {problem}\\nA:".
"""

BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."

BASE_BOXED = ("A question and its solution. The solution reasons step by step and puts the final answer within \\boxed{}.\n\n"
              "Question: {problem}\n\nSolution:")

ANSWER = ("Solve the problem step by step. The last line of your response must be of the form Answer: x, x being the answer.\n\n"
          "{problem}\n")

GSM8K_FEWSHOT = """Question: A baker fills 7 trays with 12 rolls each and sells 65 rolls. How many rolls are left?
Answer: The trays hold 7 * 12 = 84 rolls. After the sale 84 - 65 = 19 rolls are left.
#### 19

Question: Mina earns $14 an hour. On Monday she works 6 hours and on Tuesday half as long. How much does she earn in all?
Answer: On Tuesday she works 6 / 2 = 3 hours, so 6 + 3 = 9 hours in all. She earns 9 * 14 = 126 dollars.
#### 126

Question: A tank holds 240 litres. A quarter of it is drained, and then 35 litres are added. How many litres are in the tank?
Answer: A quarter is 240 / 4 = 60 litres, so 240 - 60 = 180 litres remain. With 35 more there are 180 + 35 = 215 litres.
#### 215

Question: Tickets cost $9 for adults and $5 for children. How much change is there from $100 for 4 adults and 11 children?
Answer: The adults pay 4 * 9 = 36 and the children 11 * 5 = 55 dollars, together 91 dollars. The change is 100 - 91 = 9 dollars.
#### 9

Question: {problem}
Answer:"""
