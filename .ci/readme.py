"""Make README.md from nbs/index.ipynb: text, shown code, and outputs; pictures go to nbs/images/.

nbdev's own way needs Quarto; this one needs what the dev extra already brings. Links of the notebook are relative to
its folder, so that the page on the web has them right; README lies one folder up.
"""
import base64
import json
import re
from pathlib import Path

root = Path(__file__).parent.parent


def from_root(text):
    "Markdown with its relative links as README needs them."
    return re.sub(r'\]\((?!https?:|#)', '](nbs/', text)


def output_text(output, picture):
    "An output as Markdown; a PNG is written to `picture` and linked."
    data = output.get('data', {})
    if 'image/png' in data:
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(base64.b64decode(data['image/png']))
        return f'![]({picture.relative_to(root).as_posix()})'
    if 'text/markdown' in data: return from_root(''.join(data['text/markdown']))
    text = ''.join(output.get('text') or data.get('text/plain') or '').rstrip()
    return f'```\n{text}\n```' if text else ''


def readme():
    "The text of README.md."
    parts, n_pictures = ['<!-- Made from nbs/index.ipynb by .ci/readme.py. Edit the notebook. -->'], 0
    for cell in json.loads((root / 'nbs/index.ipynb').read_text())['cells']:
        source = ''.join(cell['source'])
        directives, body = re.match(r'((?:#\|.*\n)*)(.*)', source, re.S).groups()
        if cell['cell_type'] == 'markdown': parts.append(from_root(source))
        elif '#| hide' not in directives + body[:8]:
            if 'echo: false' not in directives: parts.append(f'```python\n{body.strip()}\n```')
            for output in cell['outputs']:
                picture = root / f'nbs/images/readme{n_pictures}.png'
                n_pictures += 'image/png' in output.get('data', {})
                parts.append(output_text(output, picture))
            caption = re.search(r'fig-cap: "(.*)"', directives)
            if caption: parts.append(f'*{caption[1]}*')
    return '\n\n'.join(p for p in parts if p) + '\n'


if __name__ == '__main__':
    (root / 'README.md').write_text(readme())
