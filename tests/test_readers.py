"""data.waterbirds: every defect of a data folder is one line that names file and mend; no file can do more harm than that."""
import csv
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from dreamer_wb.core.runs import UserError
from dreamer_wb.data import waterbirds
from dreamer_wb.data.waterbirds import (COLUMNS, OFFICIAL, RELEASE, SPLITS, check_official, fetch, group_counts, mask_box, read_image,
                                        read_mask, read_table, write_table)

HEADER = 'img_id,img_filename,y,split,place,place_filename'
NAMES = ('001.Black_footed_Albatross/Albatross_1.jpg', '021.Eastern_Towhee/Eastern_Towhee_2.jpg', '鳥 の/が 3.png', 'x/4.jpg')


def picture(path, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (9, 200, 30)).save(path)

@pytest.fixture
def public(tmp_path):
    "A small folder in the public layout."
    for name in NAMES: picture(tmp_path/'raw'/name)
    rows = [f'{i + 1},{n},{y},{s},{p},/f/forest/1.jpg' for i, (n, y, s, p) in enumerate(zip(NAMES, (1, 1, 0, 0), (0, 0, 1, 2), (1, 0, 0, 1)))]
    (tmp_path/'raw/metadata.csv').write_text('\n'.join([HEADER, *rows]) + '\n', 'utf-8')
    return tmp_path/'raw'

@pytest.fixture
def recipe(tmp_path):
    "A small folder in the first recipe's layout."
    for split in SPLITS:
        for name in ('a b.jpg', 'sub/鳥.png'): picture(tmp_path/'raw'/split/name)
        (tmp_path/'raw'/split/'class.txt').write_text('a b.jpg 0\nsub/鳥.png 1\n', 'utf-8')
    return tmp_path/'raw'

def fails(root, *words, **kwargs):
    with pytest.raises(UserError) as e: read_table(root, **kwargs)
    text = str(e.value)
    assert '\n' not in text and all(w in text for w in words), text

def edit(path, old, new):
    text = path.read_text('utf-8')
    assert old in text
    path.write_text(text.replace(old, new, 1), 'utf-8')


# ---- the public release

def test_public(public):
    table = read_table(public)
    assert tuple(table.columns) == COLUMNS
    assert table[['split', 'label', 'place', 'group']].values.tolist() == [['train', 1, 1, 3], ['train', 1, 0, 2], ['val', 0, 0, 0], ['test', 0, 1, 1]]
    assert all(os.path.isfile(p) for p in table['path']) and table['mask'].tolist() == [''] * 4 and table['box'].tolist() == [None] * 4
    assert read_table(public.parent).equals(table)                      # the folder above, as after unpacking
    assert read_table(public/'metadata.csv').equals(table)
    assert read_table(public, fix_labels=True)['label'].tolist() == [1, 0, 0, 0]
    assert read_table(public, fix_labels=True)['group'].tolist() == [3, 0, 0, 1]

def test_wilds_and_windows(public):
    (public/'RELEASE_v1.0.txt').write_text('')
    text = (public/'metadata.csv').read_text('utf-8').replace('/', '\\').replace('\n', '\r\n')
    (public/'metadata.csv').write_bytes(text.encode('utf-8-sig'))
    with pytest.warns(UserWarning, match='differ from the published release'): assert len(read_table(public)) == 4

@pytest.mark.parametrize('old, new, words', [
    (HEADER, 'id,name', ("no column 'img_filename'",)),
    (',1,0,1,/f', ',2,0,1,/f', ('metadata.csv line 2', "y is '2'", '0, 1')),
    (',1,0,1,/f', ',1,3,1,/f', ('metadata.csv line 2', "split is '3'")),
    (',1,0,1,/f', ',1,0,,/f', ('metadata.csv line 2', "place is ''")),
    ('x/4.jpg', 'x/5.jpg', ('metadata.csv line 5', "no image 'x/5.jpg'", 'remove the line')),
    ('x/4.jpg', NAMES[0], ('metadata.csv line 5', 'was listed before')),
    ('x/4.jpg', '../../etc/passwd', ('metadata.csv line 5', 'not a path inside')),
    ('x/4.jpg', '/etc/passwd', ('metadata.csv line 5', 'not a path inside')),
    ('x/4.jpg', 'C:/x.jpg', ('metadata.csv line 5', 'not a path inside')),
    ('x/4.jpg,0,2', 'x/4.jpg,0,0', ("no image in the split 'test'",)),
    ('x/4.jpg', '"x/4.jpg', ('metadata.csv', 'not csv')),
])
def test_defects_of_metadata(public, old, new, words):
    edit(public/'metadata.csv', old, new)
    fails(public, *words)


# ---- the first recipe

def test_recipe(recipe):
    table = read_table(recipe)
    assert table[['split', 'label', 'place', 'group']].values.tolist() == [[s, y, -1, -1] for s in SPLITS for y in (0, 1)]

@pytest.mark.parametrize('name', ['a b.jpg', './a b.jpg', '"a b.jpg"', 'train/a b.jpg', 'TAB'])
@pytest.mark.parametrize('code', ['utf-8', 'utf-8-sig', 'utf-16', 'cp932'])
def test_ways_to_write_a_line(recipe, name, code):
    first = 'a b.jpg\t0' if name == 'TAB' else f'{name} 0'
    (recipe/'train/class.txt').write_bytes(f'{first}\r\n\r\n鳥.png, 1\r\n'.encode(code))
    assert read_table(recipe)['label'].tolist() == [0, 1] * 3

def test_composed_and_decomposed_names(recipe):
    picture(recipe/'val'/'か\u3099.jpg')                                   # as macOS stores が
    (recipe/'val/class.txt').write_text('a b.jpg 0\n鳥.png 1\nが.jpg 1\n', 'utf-8')
    assert read_table(recipe)['label'].tolist() == [0, 1, 0, 1, 1, 0, 1]

def test_class_txt_at_the_root(recipe):
    for s in SPLITS: (recipe/s/'class.txt').unlink()
    lines = [f'{s}/{n} {y} {y}' for s in SPLITS for n, y in (('a b.jpg', 0), ('sub/鳥.png', 1))]
    (recipe/'class.txt').write_text('\n'.join(lines), 'utf-8')
    assert read_table(recipe)['group'].tolist() == [0, 3] * 3
    (recipe/'class.txt').write_text('\n'.join(lines + ['train/c.jpg 0']), 'utf-8')
    fails(recipe, 'class.txt line 7', "no image 'train/c.jpg'", 'remove the line')
    (recipe/'class.txt').write_text('\n'.join(lines[:-1]), 'utf-8')
    fails(recipe, '鳥.png: image without a line', 'sub/鳥.png 0')
    (recipe/'class.txt').write_text('a b.jpg 0\n鳥.png 1\n', 'utf-8')
    fails(recipe, 'class.txt line 1', 'more than one split', 'train/a b.jpg')

@pytest.mark.parametrize('line, words', [
    ('c.jpg 0', ('train/class.txt line 3', "no image 'c.jpg'", 'remove the line')),
    ('a b.jpg 0', ('train/class.txt line 3', 'was named before', 'class.txt line 1')),
    ('a b.jpg', ('train/class.txt line 3', 'not `name label`')),
    ('a b.jpg land', ('train/class.txt line 3', "label is 'land'", '0, 1')),
    ('a b.jpg 0 7', ('train/class.txt line 3', "place is '7'")),
    ('../val/a b.jpg 0', ('train/class.txt line 3', 'no image')),
])
def test_lines_that_mean_nothing(recipe, line, words):
    with open(recipe/'train/class.txt', 'a', encoding='utf-8') as f: f.write(line)
    fails(recipe, *words)

def test_images_without_a_line(recipe):
    for name in ('c.jpg', 'd.jpg'): picture(recipe/'test'/name)
    fails(recipe, 'test/c.jpg: image without a line', '(and 1 more)', 'add `c.jpg 0`')

def test_same_name_twice(recipe):
    picture(recipe/'test/other/鳥.png')
    (recipe/'test/class.txt').write_text('a b.jpg 0\n鳥.png 1\n', 'utf-8')
    fails(recipe, 'test/class.txt line 2', 'name of 2 images', 'sub-folder')

def test_missing_and_empty_splits(recipe):
    fails(recipe/'none', 'no such folder', 'download=true')
    shutil.rmtree(recipe/'val/sub')
    (recipe/'val/a b.jpg').unlink()
    (recipe/'val/class.txt').write_text('')
    fails(recipe, 'val: no images')
    (recipe/'val/class.txt').unlink()
    fails(recipe, 'val/class.txt: no such file', 'name label')
    shutil.rmtree(recipe/'val')
    fails(recipe, 'val: no such folder')
    fails(recipe/'train/sub', 'no class.txt, metadata.csv, table.csv')
    fails(recipe, 'no metadata.csv', layout='metadata')
    fails(recipe, 'layout=wilds: no such layout', layout='wilds')


# ---- our own table

def test_table_round_trip(public, tmp_path):
    table = read_table(public)
    table['box'] = [(0, 1, 2, 3), None, None, None]
    write_table(table, tmp_path/'deep/er/table.csv')
    assert '../../raw/' in (tmp_path/'deep/er/table.csv').read_text('utf-8')
    again = read_table(tmp_path/'deep/er')
    assert again.equals(table)

@pytest.mark.parametrize('old, new, words', [
    ('path,', 'file,', ("no column 'path'",)),
    ('x/4.jpg', 'x/5.jpg', ('table.csv line 5', "no file 'raw/x/5.jpg'")),
    (',train,', ',training,', ('table.csv line 2', "split is 'training'", 'train, val, test')),
    (',1,1,3,', ',1,1,2,', ('table.csv line 2', 'group is 2', '2*label + place is 3')),
    (',1,1,3,,', ',1,1,3,none.png,', ('table.csv line 2', "no file 'none.png' for mask")),
    (',1,1,3,,\n', ',1,1,3,,1 2 3\n', ('table.csv line 2', "box is '1 2 3'", 'x0 y0 x1 y1')),
    (',1,1,3,,\n', ',1,1,3,,5 0 5 3\n', ('table.csv line 2', 'box')),
])
def test_defects_of_a_table(public, tmp_path, old, new, words):
    write_table(read_table(public), tmp_path/'table.csv')
    edit(tmp_path/'table.csv', old, new)
    fails(tmp_path/'table.csv', *words)


# ---- masks and numbers

def test_segmentations(public, tmp_path):
    seg = tmp_path/'segmentations'
    for name in NAMES[:2]:
        (seg/name).parent.mkdir(parents=True)
        Image.fromarray(np.uint8([[0, 0, 0], [0, 204, 255], [0, 102, 127]])).save((seg/name).with_suffix('.png'))
    table = read_table(public, segmentations=seg, boxes=True)
    assert [bool(m) for m in table['mask']] == [True, True, False, False]
    assert table['box'].tolist() == [(1, 1, 3, 2), (1, 1, 3, 2), None, None]     # more than half of the annotators
    fails(public, 'no such folder', segmentations=tmp_path/'none')
    fails(public, 'no segmentation for any image', segmentations=public/'x')
    shutil.copytree(seg, public/'segmentations')
    assert read_table(public)['mask'][0] == str(public/'segmentations/001.Black_footed_Albatross/Albatross_1.png')

def test_official_numbers(tmp_path):
    import pandas as pd
    rows = [dict(split=s, label=g // 2, place=g % 2, group=g) for s in SPLITS for g in range(4) for _ in range(OFFICIAL[s][g])]
    table = pd.DataFrame(rows)
    assert len(table) == 11788 and group_counts(table).to_numpy().tolist() == [list(OFFICIAL[s]) for s in SPLITS]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert check_official(table, tmp_path)
        assert not check_official(table[:100], tmp_path)                       # somebody's own set: nothing to compare
    table.loc[0, 'group'] = 1
    with pytest.warns(UserWarning, match=r'train \(3497, 185, 56, 1057\)'): assert not check_official(table, tmp_path)
    with pytest.warns(UserWarning, match='differ'): check_official(table[:-1], tmp_path/RELEASE)

@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'CMYK', '1'])
def test_any_kind_of_image(tmp_path, mode):
    path = tmp_path/f'a.{"tif" if mode == "CMYK" else "png"}'
    Image.new(mode, (4, 3)).save(path)
    assert np.asarray(read_image(path)).shape == (3, 4, 3)

def test_unreadable_images(tmp_path):
    picture(tmp_path/'a.jpg', (60, 60))
    data = (tmp_path/'a.jpg').read_bytes()
    for bad in (b'', b'GIF', data[:300], bytes(1000)):
        (tmp_path/'b.jpg').write_bytes(bad)
        with pytest.raises(UserError, match=r'b\.jpg: not a readable image .*replace it'): read_image(tmp_path/'b.jpg')
    with pytest.raises(UserError, match='no such image'): read_mask(tmp_path/'c.png')
    with pytest.raises(UserError, match='not a readable image'): read_image(tmp_path)

def test_image_that_would_fill_the_memory(tmp_path, monkeypatch):
    picture(tmp_path/'a.png', (300, 300))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(UserError, match='not a readable image'): read_image(tmp_path/'a.png')


# ---- fuzzing

change = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(['set', 'cut', 'insert', 'drop', 'swap']), st.integers(0, 255))

def mutate(data, changes):
    data = bytearray(data)
    for at, how, value in changes:
        i = int(at * len(data))
        if how == 'set' and data: data[i] = value
        elif how == 'insert': data[i:i] = bytes([value]) * (1 + value % 5)
        elif how == 'drop': del data[i:i + 1 + value % 9]
        elif how == 'cut' and value < 60: del data[i:]
        elif how == 'swap' and data: data[i:i + 1] = b',\n" ./01\r\t\xef'[value % 11:][:1]
    return bytes(data)

def folder_of(layout, root):
    for name in NAMES: picture(root/'raw'/name)
    if layout == 'metadata':
        rows = [f'{i + 1},{n},{i % 2},{min(i, 2)},0,/f/1.jpg' for i, n in enumerate(NAMES)]
        file, text = root/'raw/metadata.csv', '\n'.join([HEADER, *rows])
    elif layout == 'table':
        rows = [f'raw/{n},{SPLITS[min(i, 2)]},{i % 2},0,{2 * (i % 2)},,0 0 3 4' for i, n in enumerate(NAMES)]
        file, text = root/'table.csv', '\n'.join([','.join(COLUMNS), *rows])
    else:
        for s in SPLITS: picture(root/'raw'/s/'鳥 1.jpg'), picture(root/'raw'/s/'sub/2.png')
        file, text = root/'raw/class.txt', '\n'.join(f'{s}/{n}' for s in SPLITS for n in ('鳥 1.jpg 0', 'sub/2.png 1 1'))
    return file, text.encode()

@pytest.mark.parametrize('layout', ['metadata', 'table', 'class_txt'])
def test_fuzz_lists(layout):
    with tempfile.TemporaryDirectory() as tmp:
        file, data = folder_of(layout, Path(tmp))
        root = file if layout == 'table' else file.parent
        file.write_bytes(data)
        whole = read_table(root, layout)

        @settings(max_examples=150, deadline=None)
        @given(st.lists(change, min_size=1, max_size=4))
        def fuzz(changes):
            file.write_bytes(mutate(data, changes))
            try: table = read_table(root, layout)
            except UserError as e: assert '\n' not in str(e) and tmp in str(e)
            else:
                assert set(table['path']) <= {str(p) for p in Path(tmp).rglob('*') if p.is_file()}
                assert set(table['split']) == set(SPLITS) and set(table['label']) <= {-1, 0, 1} and len(table) <= len(whole)
        fuzz()

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(['jpg', 'png']), st.lists(change, min_size=1, max_size=4))
def test_fuzz_images(kind, changes):
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp)/f'a.{kind}'
        picture(path, (20, 20))
        path.write_bytes(mutate(path.read_bytes(), changes))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                                    # Pillow's remarks on odd files
            try: assert np.asarray(read_image(path)).ndim == 3
            except UserError as e: assert '\n' not in str(e) and str(path) in str(e)
