"""Other interfaces than OpenAI's chat and completions: bodies as chats, answers in other words."""
