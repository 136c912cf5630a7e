// Keeps the newest text in view, unless the reader has scrolled away from it.

const NEAR_PX = 80;

export class Latest {
  /** @param button leads back to the newest text */
  constructor(button) {
    this.button = button;
    this.follows = true;
    addEventListener("scroll", () => this.look(), { passive: true });
    button.addEventListener("click", () => this.jump());
  }

  /** Call after text was added. */
  follow() {
    if (this.follows) this.jump();
    else this.look();
  }

  jump() {
    this.follows = true;
    const root = document.documentElement;
    root.scrollTop = root.scrollHeight;
    this.button.hidden = true;
  }

  look() {
    const { scrollHeight, scrollTop, clientHeight } = document.documentElement;
    const below = scrollHeight - scrollTop - clientHeight;
    this.follows = below < NEAR_PX;
    this.button.hidden = this.follows;
  }
}
