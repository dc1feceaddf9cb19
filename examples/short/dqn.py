"""DQN with a target network learns to catch a falling ball. The game is in NumPy, and 64 of it are played at once."""

import keras
import numpy as np
import tapeloop as tl

keras.utils.set_random_seed(0)
layers, ops, random = keras.layers, keras.ops, np.random.default_rng(0)
SIZE, GAMES = 8, 64


class DQN(tl.Trainer):
    def train_step(self, batch):
        states, actions, rewards, following = batch
        goals = rewards + ops.where(following[:, 0] > 0, 0.95 * ops.max(self.model["target"](following), axis=-1), 0.0)
        with self.tape() as tape:
            values = ops.sum(self.model["online"](states, training=True) * ops.one_hot(actions, 3), axis=-1)
            loss = ops.mean((values - goals) ** 2)
        self.update(tape, loss)
        self.follow("target", "online", decay=ops.where(self.step % 50 == 0, 0.0, 1.0))
        return {"loss": loss}


online = keras.Sequential([keras.Input((3,)), *[layers.Dense(64, "relu") for _ in range(2)], layers.Dense(3)])
agent = DQN({"online": online, "target": keras.models.clone_model(online)}, tl.Freeze("target"), optimizer="adam")
returns, replay = [], []
for episode in range(80):
    state = np.insert(random.integers(SIZE, size=(GAMES, 2)), 0, SIZE - 1, axis=1).astype("float32")
    while state[0, 0] > 0:  # the height of the ball, its column, the paddle's column
        explores, greedy = random.random(GAMES) < 1 - episode / 60, online(state).numpy().argmax(axis=-1)
        actions = np.where(explores, random.integers(3, size=GAMES), greedy)
        moves = np.stack([np.full(GAMES, -1), np.zeros(GAMES), actions - 1], axis=-1)
        following = np.clip(state + moves, 0, SIZE - 1).astype("float32")
        caught, over = following[:, 1] == following[:, 2], following[:, 0] == 0
        replay.append((state, actions, (over * np.where(caught, 1, -1)).astype("float32"), following))
        state = following
    returns.append(replay[-1][2].mean())
    agent.fit(tuple(np.concatenate(column) for column in zip(*replay[-70:])), batch_size=128, verbose=0)
print(f"mean return of an episode: {returns[0]:.2f} in the first, {np.mean(returns[-10:]):.2f} in the last ten")
assert returns[0] < -0.5 and np.mean(returns[-10:]) > 0.8
